"""Noise schedules: the table of alphas_cumprod that fixes the forward process.

    q(x_t | x_0) = N(sqrt(abar_t) x_0, (1 - abar_t) I),   abar_t = prod_{s <= t} (1 - beta_s)      (Ho et al. 2020, eq. 4)

Timesteps are 0 .. T-1, from least to most noise; t = -1 stands for clean data (abar = 1).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float64, Int
from torch import Tensor

MAX_BETA = 0.999


@dataclass(frozen=True)
class NoiseScheduleConfig:
    """Which noise schedule: its `name` ("linear" or "cosine") and number of timesteps T.

    `beta_start` and `beta_end` belong to the linear schedule and are given for T = 1000; another T rescales them by 1000/T
    so that the whole of the noise stays the same (Nichol and Dhariwal 2021, sec. 4).
    `log_snr_shift` is added to log(abar / (1 - abar)) at every t: negative values add noise, which grids of high resolution
    need since neighbouring voxels say the same thing (Hoogeboom et al. 2023, sec. 2.1). 0 leaves the schedule as published.
    """

    name: str = "linear"
    num_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    log_snr_shift: float = 0.0

    def __post_init__(self) -> None:
        if self.name not in _BETAS:
            raise ValueError(f"noise schedule {self.name!r} is unknown; use one of {sorted(_BETAS)}")
        if self.num_timesteps < 1:
            raise ValueError(f"num_timesteps={self.num_timesteps} must be at least 1")
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"need 0 < beta_start <= beta_end < 1, got {self.beta_start} and {self.beta_end}")

    def build(self) -> NoiseSchedule:
        """The table of this schedule."""
        abar = torch.cumprod(1 - _BETAS[self.name](self), 0)
        if self.log_snr_shift:
            abar = torch.sigmoid(torch.logit(abar) + self.log_snr_shift)
        return NoiseSchedule(abar)


@dataclass(frozen=True)
class NoiseSchedule:
    """A noise schedule: `alphas_cumprod`, (T,) float64, strictly falling within (0, 1)."""

    alphas_cumprod: Float64[Tensor, " timesteps"]

    def __post_init__(self) -> None:
        abar = self.alphas_cumprod
        if abar.dtype != torch.float64 or abar.ndim != 1 or not len(abar):
            raise ValueError(f"alphas_cumprod must be (T,) float64, got {tuple(abar.shape)} {abar.dtype}")
        if not (float(abar[-1]) > 0 and float(abar[0]) < 1 and bool((abar.diff() < 0).all())):
            raise ValueError("alphas_cumprod must fall strictly within (0, 1)")

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    @cached_property
    def betas(self) -> Float64[Tensor, " timesteps"]:
        """beta_t = 1 - abar_t / abar_{t-1}."""
        return 1 - self.alphas_cumprod / self.abar(torch.arange(self.num_timesteps) - 1)

    def abar(self, t: Int[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
        """abar at each timestep on t's device, float64; 1 where t is -1. Raises IndexError outside [-1, T)."""
        padded = torch.cat([self.alphas_cumprod, self.alphas_cumprod.new_ones(1)]).to(t.device)
        return padded[t]

    def snr(self, t: Int[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
        """The signal-to-noise ratio abar / (1 - abar); infinite at t = -1."""
        abar = self.abar(t)
        return abar / (1 - abar)


def _linear_betas(config: NoiseScheduleConfig) -> Float64[Tensor, " timesteps"]:
    """Ho et al. 2020, sec. 4: betas evenly spaced between two ends."""
    scale = 1000 / config.num_timesteps
    betas = torch.linspace(config.beta_start, config.beta_end, config.num_timesteps, dtype=torch.float64)
    return (scale * betas).clamp(max=MAX_BETA)


def _cosine_betas(config: NoiseScheduleConfig) -> Float64[Tensor, " timesteps"]:
    """Nichol and Dhariwal 2021, eq. 17: abar_t = f(t) / f(0), f(t) = cos^2(pi/2 (t/T + s) / (1 + s)), s = 0.008."""
    u = torch.linspace(0, 1, config.num_timesteps + 1, dtype=torch.float64)
    f = torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
    return (1 - f[1:] / f[:-1]).clamp(max=MAX_BETA)


_BETAS = {"linear": _linear_betas, "cosine": _cosine_betas}
