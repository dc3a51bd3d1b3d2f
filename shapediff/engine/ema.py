"""The exponential moving average of the weights, kept beside each rank's own share of them."""

from __future__ import annotations

import torch
from torch import Tensor

from shapediff.engine.shares import Shares


class Ema:
    """A float32 average of this rank's share of every parameter, so that it costs 1/world under every ZeRO stage.

        average += (1 - d) * (weight - average),   d = min(decay, (1 + n) / (10 + n)) at update n

    The warm-up of d forgets the random start of a short run. The weights themselves are only read.
    """

    def __init__(self, shares: Shares, *, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self.averages = [share.weight.clone() for share in shares.mine]
        self._shares = shares

    def update(self) -> None:
        """Take in the weights as they are after an optimizer step."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        if self.averages:  # a rank may have no share of a very small network
            torch._foreach_lerp_(self.averages, [share.weight for share in self._shares.mine], 1 - decay)
        self.num_updates += 1

    def gathered(self) -> dict[str, dict[str, Tensor]]:
        """The whole average by network and parameter, float32 on the CPU; every rank must ask."""
        weights: dict[str, dict[str, Tensor]] = {}
        for key, average in self._shares.gather(self.averages):
            network, parameter = key.split(".", 1)
            weights.setdefault(network, {})[parameter] = average
        return weights
