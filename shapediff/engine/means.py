"""The means of what a method reports beside its loss, over all that was trained on since the last line of metrics."""

from __future__ import annotations

from collections import defaultdict

import torch
from jaxtyping import Float64
from torch import Tensor

from shapediff.engine import distributed
from shapediff.methods import LossOutput


class MetricMeans:
    """Means over all numbers of all ranks together; as ErrorCurves, `add` starts no exchange."""

    def __init__(self) -> None:
        self._sums: dict[str, Float64[Tensor, "2"]] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64))

    def add(self, output: LossOutput) -> None:
        """Count in what this rank trained on."""
        for name, values in output.metrics.items():
            row = torch.stack([values.sum(dtype=torch.float64), values.new_tensor(len(values), dtype=torch.float64)])
            self._sums[name] = self._sums[name].to(row.device) + row

    def take(self) -> dict[str, float]:
        """The means since the last time; every rank must ask at once. A name of which there were no numbers is left out."""
        if not self._sums:
            return {}
        names = sorted(self._sums)
        total, count = distributed.sum_over_ranks(torch.stack([self._sums[name] for name in names])).T.tolist()
        self._sums.clear()
        return {name: t / c for name, t, c in zip(names, total, count, strict=True) if c}
