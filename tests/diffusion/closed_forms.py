"""Data whose diffusion is known in closed form: mixtures of Gaussians, and what the best denoiser says of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from shapediff.diffusion.gaussian import Prediction, training_target
from shapediff.diffusion.schedule import NoiseSchedule

Denoise = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Mixture:
    """x_0 ~ sum_k weights_k N(means_k, std^2 I): `weights` (k,), `means` (k, d) float64."""

    weights: torch.Tensor
    means: torch.Tensor
    std: float

    def variance(self, abar: torch.Tensor) -> torch.Tensor:
        """The variance of x_t within a component: abar std^2 + 1 - abar."""
        return abar * self.std**2 + 1 - abar

    def responsibilities(self, x_t: torch.Tensor, abar: torch.Tensor) -> torch.Tensor:
        """P(component | x_t), (b, k); abar (b, 1)."""
        distance = (x_t[:, None] - abar.sqrt()[:, None] * self.means).square().sum(2)
        return torch.softmax(self.weights.log() - distance / (2 * self.variance(abar)), 1)

    def log_density(self, x_t: torch.Tensor, abar: torch.Tensor) -> torch.Tensor:
        """log q(x_t), (b,)."""
        distance = (x_t[:, None] - abar.sqrt()[:, None] * self.means).square().sum(2)
        log_normal = (
            -distance / (2 * self.variance(abar)) - 0.5 * x_t.shape[1] * (2 * math.pi * self.variance(abar)).log()
        )
        return torch.logsumexp(self.weights.log() + log_normal, 1)

    def x_0_of_components(self, x_t: torch.Tensor, abar: torch.Tensor) -> torch.Tensor:
        """E[x_0 | x_t, component], (b, k, d)."""
        signal = abar.sqrt()[:, None]
        gain = signal * self.std**2 / self.variance(abar)[:, None]
        return self.means + gain * (x_t[:, None] - signal * self.means)

    def x_0_hat(self, x_t: torch.Tensor, abar: torch.Tensor) -> torch.Tensor:
        """E[x_0 | x_t], (b, d)."""
        return (self.responsibilities(x_t, abar)[..., None] * self.x_0_of_components(x_t, abar)).sum(1)

    def denoiser(self, schedule: NoiseSchedule, prediction: Prediction = "v") -> Denoise:
        """The best denoiser there is, in the form of `prediction`."""

        def denoise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            abar = schedule.abar(t)[:, None]
            x_0 = self.x_0_hat(x_t, abar)
            eps = (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()
            return training_target(x_0, eps, t, prediction=prediction, schedule=schedule)

        return denoise


def gaussian(mean: float, std: float) -> Mixture:
    """x_0 ~ N(mean, std^2 I), in as many dimensions as x_t has."""
    return Mixture(torch.ones(1, dtype=torch.float64), torch.full((1, 1), mean, dtype=torch.float64), std)


def two_clusters(*, std: float = 0.1) -> Mixture:
    """A quarter of the data around (-0.6, -0.3), the rest around (0.5, 0.4)."""
    return Mixture(
        torch.tensor([0.25, 0.75], dtype=torch.float64),
        torch.tensor([[-0.6, -0.3], [0.5, 0.4]], dtype=torch.float64),
        std,
    )


def flow(x: torch.Tensor, t: int, t_end: int, *, mean: float, std: float, schedule: NoiseSchedule) -> torch.Tensor:
    """Where the probability-flow ODE of N(mean, std^2 I) takes x from t to t_end: x_t keeps its quantile."""
    abar, abar_end = schedule.abar(torch.tensor([t, t_end]))
    ratio = (abar_end * std**2 + 1 - abar_end) / (abar * std**2 + 1 - abar)
    return abar_end.sqrt() * mean + ratio.sqrt() * (x - abar.sqrt() * mean)


def even_log_snr(num_timesteps: int = 2**15) -> NoiseSchedule:
    """log SNR from 14 down to -8 in even steps: what evenly spaced timesteps make the textbook's equal steps."""
    return NoiseSchedule(torch.sigmoid(torch.linspace(14, -8, num_timesteps, dtype=torch.float64)))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    """Standard normal numbers, float64."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
