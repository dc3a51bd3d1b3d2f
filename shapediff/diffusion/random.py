"""Randomness with one generator a sample, so that sample i is the same whatever the batch it is computed in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from jaxtyping import Float, Int
from torch import Tensor


class Noise(Protocol):
    """What samplers draw from: a NoiseSource, or a blend of two."""

    def normal(self, *shape: int) -> Float[Tensor, "b ..."]:
        """Standard normal numbers, (b, *shape) float32."""
        ...


class NoiseSource:
    """Independent random streams, one for each of `seeds` (b,); every draw returns (b, ...) on `device`.

    Numbers are drawn on the CPU unless `draw_on` says otherwise, so that a seed means the same shape on every machine;
    training draws on its own device, where copying noise would hold up the GPU.
    """

    def __init__(
        self,
        seeds: Sequence[int] | Int[Tensor, " b"],
        device: torch.device | str = "cpu",
        *,
        draw_on: torch.device | str = "cpu",
    ) -> None:
        self._device = torch.device(device)
        self._draw_on = torch.device(draw_on)
        self._generators = [torch.Generator(self._draw_on).manual_seed(int(seed)) for seed in seeds]

    def normal(self, *shape: int) -> Float[Tensor, "b ..."]:
        """Standard normal numbers, (b, *shape) float32."""
        return self._stack(torch.randn(shape, generator=g, device=self._draw_on) for g in self._generators)

    def uniform(self) -> Float[Tensor, " b"]:
        """One number in [0, 1) a sample."""
        return self._stack(torch.rand((), generator=g, device=self._draw_on) for g in self._generators)

    def integers(self, high: int) -> Int[Tensor, " b"]:
        """One integer in [0, high) a sample, int64."""
        return self._stack(torch.randint(high, (), generator=g, device=self._draw_on) for g in self._generators)

    def _stack(self, draws: Iterable[Tensor]) -> Tensor:
        return torch.stack(list(draws)).to(self._device)
