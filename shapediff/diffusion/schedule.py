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
    """Which noise schedule: its `name` (linear, scaled_linear, cosine or sigmoid) and number of timesteps T.

    `beta_start` and `beta_end` belong to the linear and scaled_linear schedules, None meaning as published for each. They are
    given for T = 1000; another T rescales betas by 1000/T so that the whole of the noise stays the same (Nichol and Dhariwal
    2021, sec. 4).
    `log_snr_shift` is added to log(abar / (1 - abar)) at every t: negative values add noise, which grids of high resolution
    need since neighbouring voxels say the same thing (Hoogeboom et al. 2023, sec. 2.1). 0 leaves the schedule as published.
    `zero_terminal_snr` ends the schedule, after the shift, in pure noise: sampling then starts from what training saw.
    """

    name: str = "linear"
    num_timesteps: int = 1000
    beta_start: float | None = None
    beta_end: float | None = None
    log_snr_shift: float = 0.0
    zero_terminal_snr: bool = False

    def __post_init__(self) -> None:
        if self.name not in _BETAS:
            raise ValueError(f"noise schedule {self.name!r} is unknown; use one of {sorted(_BETAS)}")
        if self.num_timesteps < 1:
            raise ValueError(f"num_timesteps={self.num_timesteps} must be at least 1")
        if self.zero_terminal_snr and self.num_timesteps < 2:
            raise ValueError(
                "zero_terminal_snr needs num_timesteps of at least 2, since it keeps the first and moves the last"
            )
        beta_start, beta_end = _beta_range(self)
        if not 0 < beta_start <= beta_end < 1:
            raise ValueError(f"need 0 < beta_start <= beta_end < 1, got {beta_start} and {beta_end}")

    def build(self) -> NoiseSchedule:
        """The table of this schedule."""
        abar = torch.cumprod(1 - _BETAS[self.name](self), 0)
        if self.log_snr_shift:
            abar = torch.sigmoid(torch.logit(abar) + self.log_snr_shift)
        return NoiseSchedule(with_zero_terminal_snr(abar) if self.zero_terminal_snr else abar)


@dataclass(frozen=True)
class NoiseSchedule:
    """A noise schedule: `alphas_cumprod`, (T,) float64, strictly falling within (0, 1); the last may be 0, pure noise."""

    alphas_cumprod: Float64[Tensor, " timesteps"]

    def __post_init__(self) -> None:
        abar = self.alphas_cumprod
        if abar.dtype != torch.float64 or abar.ndim != 1 or not len(abar):
            raise ValueError(f"alphas_cumprod must be (T,) float64, got {tuple(abar.shape)} {abar.dtype}")
        if not (float(abar[-1]) >= 0 and float(abar[0]) < 1 and bool((abar.diff() < 0).all())):
            raise ValueError("alphas_cumprod must fall strictly within (0, 1), to 0 at most")

    @property
    def num_timesteps(self) -> int:
        """T."""
        return len(self.alphas_cumprod)

    @property
    def ends_in_pure_noise(self) -> bool:
        """Whether abar_{T-1} is 0: no signal at all, and x_0 cannot be told from eps there."""
        return float(self.alphas_cumprod[-1]) == 0

    @cached_property
    def betas(self) -> Float64[Tensor, " timesteps"]:
        """beta_t = 1 - abar_t / abar_{t-1}."""
        return 1 - self.alphas_cumprod / self.abar(torch.arange(self.num_timesteps) - 1)

    def abar(self, t: Int[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
        """abar at each timestep on t's device, float64; 1 where t is -1. Raises IndexError outside [-1, T)."""
        padded = torch.cat([self.alphas_cumprod, self.alphas_cumprod.new_ones(1)]).to(t.device)
        return padded[t]

    def snr(self, t: Int[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
        """The signal-to-noise ratio abar / (1 - abar); infinite at t = -1, and 0 where there is no signal."""
        abar = self.abar(t)
        return abar / (1 - abar)

    def noise_level(self, t: Int[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
        """sqrt(1 - abar), the standard deviation of the noise in x_t: 0 at t = -1, at most 1."""
        return (1 - self.abar(t)).sqrt()

    def sigma(self, t: Int[Tensor, "*shape"]) -> Float64[Tensor, "*shape"]:
        """sqrt(1 - abar) / sqrt(abar), the noise of x_t / sqrt(abar) = x_0 + sigma eps (Karras et al. 2022): 1 / sqrt(SNR)."""
        return self.snr(t).rsqrt()


def with_zero_terminal_snr(alphas_cumprod: Float64[Tensor, " timesteps"]) -> Float64[Tensor, " timesteps"]:
    """Shift and scale sqrt(abar) so that the last is 0 and the first stays (Lin et al. 2024, algorithm 1); T >= 2."""
    signal = alphas_cumprod.sqrt()
    first, last = signal[0], signal[-1]
    return ((signal - last) * (first / (first - last))).square()


def _beta_range(config: NoiseScheduleConfig) -> tuple[float, float]:
    """The first and last beta at T = 1000: those given, else those published; where there are none, those of linear."""
    start, end = _PUBLISHED_BETAS.get(config.name, _PUBLISHED_BETAS["linear"])
    return (
        start if config.beta_start is None else config.beta_start,
        end if config.beta_end is None else config.beta_end,
    )


def _linear_betas(config: NoiseScheduleConfig) -> Float64[Tensor, " timesteps"]:
    """Ho et al. 2020, sec. 4: betas evenly spaced between two ends."""
    return _rescaled(torch.linspace(*_beta_range(config), config.num_timesteps, dtype=torch.float64))


def _scaled_linear_betas(config: NoiseScheduleConfig) -> Float64[Tensor, " timesteps"]:
    """Rombach et al. 2022, the schedule of latent diffusion: sqrt(beta) evenly spaced between two ends."""
    start, end = _beta_range(config)
    return _rescaled(torch.linspace(start**0.5, end**0.5, config.num_timesteps, dtype=torch.float64).square())


def _rescaled(betas: Float64[Tensor, " timesteps"]) -> Float64[Tensor, " timesteps"]:
    """Betas meant for 1000 timesteps, for as many as there are."""
    return (1000 / len(betas) * betas).clamp(max=MAX_BETA)


def _cosine_betas(config: NoiseScheduleConfig) -> Float64[Tensor, " timesteps"]:
    """Nichol and Dhariwal 2021, eq. 17: abar_t = f(t + 1) / f(0), f(t) = cos^2(pi/2 (t/T + s) / (1 + s)), s = 0.008."""
    u = torch.linspace(0, 1, config.num_timesteps + 1, dtype=torch.float64)
    return _betas_of_curve(torch.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2)


def _sigmoid_betas(config: NoiseScheduleConfig) -> Float64[Tensor, " timesteps"]:
    """Jabri et al. 2022: abar_t falls as the sigmoid from 3 to -3, moved to run from 1 to 0 (start -3, end 3, tau 1)."""
    u = torch.linspace(0, 1, config.num_timesteps + 1, dtype=torch.float64)
    f = torch.sigmoid(3 - 6 * u)
    return _betas_of_curve(f - f[-1])


def _betas_of_curve(f: Float64[Tensor, " points"]) -> Float64[Tensor, " timesteps"]:
    """The betas of abar_t = f_{t+1} / f_0, cut to MAX_BETA where the curve reaches 0."""
    return (1 - f[1:] / f[:-1]).clamp(max=MAX_BETA)


_BETAS = {
    "linear": _linear_betas,
    "scaled_linear": _scaled_linear_betas,
    "cosine": _cosine_betas,
    "sigmoid": _sigmoid_betas,
}
_PUBLISHED_BETAS = {"linear": (1e-4, 0.02), "scaled_linear": (0.00085, 0.012)}
