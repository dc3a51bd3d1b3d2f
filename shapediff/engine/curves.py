"""The error by timestep and by class, over all that was trained on since the last line of metrics."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from shapediff.engine import distributed
from shapediff.grid.segment import indptr_from_sorted, segment_reduce
from shapediff.methods import LossOutput

NUM_TIMESTEP_BUCKETS = 10
MAX_WAITING = 1000
SIGNIFICANT_DIGITS = 6


class ErrorCurves:
    """Mean unweighted errors in equal buckets of timesteps and in each class, of all ranks together.

    `add` only keeps what it is given, on the device where it is: no kernel and no wait. The sums are made when they are
    read, or after MAX_WAITING micro batches, so that rare reading takes no memory.
    """

    def __init__(self, num_timesteps: int, classes: Sequence[str]) -> None:
        self._num_timesteps = num_timesteps
        self._num_buckets = min(NUM_TIMESTEP_BUCKETS, num_timesteps)
        self._classes = tuple(classes)
        self._waiting: list[tuple[Tensor, Tensor, Tensor]] = []
        self._sums: Float64[Tensor, "buckets 2"] | None = None

    def add(self, output: LossOutput) -> None:
        """Count in what this rank trained on."""
        # Not the output itself: its loss would keep the graph of the whole step alive.
        self._waiting.append((output.error, output.t, output.label))
        if len(self._waiting) >= MAX_WAITING:
            self._fold()

    def take(self) -> dict[str, list[float | None] | dict[str, float | None]]:
        """The means since the last time, None where there was nothing; every rank must ask at once, and after an `add`."""
        self._fold()
        assert self._sums is not None, "nothing was added"
        total, count = distributed.sum_over_ranks(self._sums).T.tolist()
        self._sums = None
        means = [_rounded(t / c) if c else None for t, c in zip(total, count, strict=True)]
        by_timestep, by_class = means[: self._num_buckets], means[self._num_buckets :]
        return {"error_by_timestep": by_timestep, "error_by_class": dict(zip(self._classes, by_class, strict=True))}

    def _fold(self) -> None:
        """Sum up what waits: a row (sum, count) a bucket, then a row a class."""
        if not self._waiting:
            return
        error, t, label = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
        bucket = t * self._num_buckets // self._num_timesteps
        sums = torch.cat(
            [sums_and_counts(error, bucket, self._num_buckets), sums_and_counts(error, label, len(self._classes))]
        )
        self._sums = sums if self._sums is None else self._sums + sums
        self._waiting = []


def sums_and_counts(
    values: Float[Tensor, " n"], ids: Int[Tensor, " n"], num_segments: int
) -> Float64[Tensor, "segments 2"]:
    """The sum of the values of each id in [0, num_segments), and how many there are."""
    ids, order = ids.sort(stable=True)
    rows = torch.stack([values.double(), torch.ones_like(values, dtype=torch.float64)], 1)
    return segment_reduce(rows[order], indptr_from_sorted(ids, num_segments), "sum")


def _rounded(value: float) -> float:
    """So that a line of many numbers stays short."""
    return float(f"{value:.{SIGNIFICANT_DIGITS}g}")
