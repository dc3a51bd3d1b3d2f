"""The exponential moving average of the weights, kept beside each rank's own share of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn


class Ema:
    """A float32 average of every parameter; under ZeRO-3 of this rank's partition alone, so that it costs 1/world.

        average += (1 - d) * (weight - average),   d = min(decay, (1 + n) / (10 + n)) at update n

    The warm-up of d forgets the random start of a short run.
    """

    def __init__(self, networks: Mapping[str, nn.Module], *, decay: float) -> None:
        self.decay = decay
        self.num_updates = 0
        self._networks = networks
        self._average = {key: _local(p).detach().float().clone() for key, p in self._parameters()}

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are after an optimizer step."""
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        keys, weights = zip(*((key, _local(p).detach().float()) for key, p in self._parameters()), strict=True)
        torch._foreach_lerp_([self._average[key] for key in keys], list(weights), 1 - decay)
        self.num_updates += 1

    def gathered(self) -> dict[str, dict[str, Tensor]]:
        """The whole average by network and parameter, float32 on the CPU. Under ZeRO-3 every rank must call it."""
        weights: dict[str, dict[str, Tensor]] = {name: {} for name in self._networks}
        for key, p in self._parameters():
            name, parameter = key.split(".", 1)
            weights[name][parameter] = _gather(p, self._average[key])
        return weights

    def state_dict(self) -> dict[str, Tensor | int]:
        """This rank's share, for resuming."""
        return {"num_updates": self.num_updates, **self._average}

    def load_state_dict(self, state: Mapping[str, Tensor | int]) -> None:
        """Take up a share that `state_dict` gave. Raises KeyError or RuntimeError where it does not fit."""
        self.num_updates = int(state["num_updates"])
        for key, average in self._average.items():
            average.copy_(torch.as_tensor(state[key]))

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, network in self._networks.items():
            for parameter, value in network.named_parameters():
                yield f"{name}.{parameter}", value


def _local(p: nn.Parameter) -> Tensor:
    """What this rank holds of a parameter: the whole of it, or its flat partition under ZeRO-3."""
    return p.ds_tensor if hasattr(p, "ds_tensor") else p


@torch.no_grad()
def _gather(p: nn.Parameter, average: Tensor) -> Tensor:
    if not hasattr(p, "ds_tensor"):
        return average.detach().to("cpu", copy=True)
    import deepspeed

    # Lend the average to the partition, gather, and give the weights back: DeepSpeed gathers only its own partitions.
    weights = p.ds_tensor.clone()
    p.ds_tensor.copy_(average)
    try:
        with deepspeed.zero.GatheredParameters([p]):
            return p.detach().float().to("cpu", copy=True)
    finally:
        p.ds_tensor.copy_(weights)
