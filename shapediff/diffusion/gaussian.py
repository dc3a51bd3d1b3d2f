"""The Gaussian algebra between x_0, eps, v and x_t, and the posterior of the forward process.

Every function works on tensors (b, ...) with one timestep a sample, `t` (b,) in [-1, T). Coefficients are computed in
float64 and cast once to the dtype of the data.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Float, Float64, Int
from torch import Tensor

from shapediff.diffusion.schedule import NoiseSchedule

Prediction = Literal["epsilon", "x0", "v"]
PREDICTIONS: tuple[str, ...] = get_args(Prediction)


@dataclass(frozen=True)
class Denoised:
    """What one evaluation of the denoiser says about x_t: the clean data and the noise, both (b, ...).

    `variance_fraction` (b, ...) is where a learned variance lies between log beta~ and log beta; None where it is fixed.
    """

    x_0: Float[Tensor, "b ..."]
    eps: Float[Tensor, "b ..."]
    variance_fraction: Float[Tensor, "b ..."] | None = None


@dataclass(frozen=True)
class Posterior:
    """q(x_prev | x_t, x_0): `mean` (b, ...) and `variance` (b, 1, ...), float64 cast to the data's dtype."""

    mean: Float[Tensor, "b ..."]
    variance: Float[Tensor, "b ..."]


def q_sample(
    x_0: Float[Tensor, "b ..."], eps: Float[Tensor, "b ..."], t: Int[Tensor, " b"], *, schedule: NoiseSchedule
) -> Float[Tensor, "b ..."]:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps (Ho et al. 2020, eq. 4)."""
    abar = schedule.abar(t)
    return _scaled(abar.sqrt(), x_0) + _scaled((1 - abar).sqrt(), eps)


def training_target(
    x_0: Float[Tensor, "b ..."],
    eps: Float[Tensor, "b ..."],
    t: Int[Tensor, " b"],
    *,
    prediction: Prediction,
    schedule: NoiseSchedule,
) -> Float[Tensor, "b ..."]:
    """What the denoiser should output: eps, x_0, or v = sqrt(abar) eps - sqrt(1 - abar) x_0 (Salimans and Ho 2022)."""
    if prediction == "epsilon":
        return eps
    if prediction == "x0":
        return x_0
    abar = schedule.abar(t)
    return _scaled(abar.sqrt(), eps) - _scaled((1 - abar).sqrt(), x_0)


def denoised(
    output: Float[Tensor, "b ..."],
    x_t: Float[Tensor, "b ..."],
    t: Int[Tensor, " b"],
    *,
    prediction: Prediction,
    schedule: NoiseSchedule,
) -> Denoised:
    """x_0 and eps from the denoiser's output, exactly: they satisfy x_t = sqrt(abar) x_0 + sqrt(1 - abar) eps.

    At abar = 0 the predictions x0 and v still say both; epsilon says nothing of x_0 there, and x_0 is not finite.
    """
    abar = schedule.abar(t)
    signal, noise = abar.sqrt(), (1 - abar).sqrt()
    if prediction == "epsilon":
        return Denoised(x_0=_scaled(1 / signal, x_t) - _scaled(noise / signal, output), eps=output)
    if prediction == "x0":
        return Denoised(x_0=output, eps=eps_from_x0(output, x_t, t, schedule=schedule))
    return Denoised(
        x_0=_scaled(signal, x_t) - _scaled(noise, output), eps=_scaled(noise, x_t) + _scaled(signal, output)
    )


def eps_from_x0(
    x_0: Float[Tensor, "b ..."], x_t: Float[Tensor, "b ..."], t: Int[Tensor, " b"], *, schedule: NoiseSchedule
) -> Float[Tensor, "b ..."]:
    """eps = (x_t - sqrt(abar) x_0) / sqrt(1 - abar); t must be at least 0."""
    abar = schedule.abar(t)
    return _scaled(1 / (1 - abar).sqrt(), x_t) - _scaled((abar / (1 - abar)).sqrt(), x_0)


def score(eps: Float[Tensor, "b ..."], t: Int[Tensor, " b"], *, schedule: NoiseSchedule) -> Float[Tensor, "b ..."]:
    """The gradient of log q(x_t): -eps / sqrt(1 - abar) (Song et al. 2021, "Score-based", sec. 3.3); t must be at least 0."""
    return _scaled(-1 / schedule.noise_level(t), eps)


def posterior(
    x_0: Float[Tensor, "b ..."],
    x_t: Float[Tensor, "b ..."],
    t: Int[Tensor, " b"],
    t_prev: Int[Tensor, " b"],
    *,
    schedule: NoiseSchedule,
) -> Posterior:
    """q(x_prev | x_t, x_0) between any two timesteps t_prev < t (Ho et al. 2020, eq. 6 and 7, on the respaced chain)."""
    abar, abar_prev = schedule.abar(t), schedule.abar(t_prev)
    alpha = abar / abar_prev
    mean = _scaled(abar_prev.sqrt() * (1 - alpha) / (1 - abar), x_0) + _scaled(
        alpha.sqrt() * (1 - abar_prev) / (1 - abar), x_t
    )
    variance = (1 - alpha) * (1 - abar_prev) / (1 - abar)
    return Posterior(mean=mean, variance=column(variance, x_t))


def column(values: Float64[Tensor, " b"], like: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    """One number a sample, in the dtype of `like` and ready to multiply it: (b, 1, ...)."""
    return values.to(like.dtype).reshape(-1, *[1] * (like.ndim - 1))


def _scaled(factor: Float64[Tensor, " b"], x: Float[Tensor, "b ..."]) -> Float[Tensor, "b ..."]:
    return column(factor, x) * x


def per_sample_mean(values: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    """The mean over everything but the batch, float32 or better."""
    return torch.flatten(values, 1).mean(1)
