"""The variational bound on -log p(x_0), in bits per voxel: an evaluation, and one term of it the loss of learned variances."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from shapediff.diffusion.gaussian import column, per_sample_mean, q_sample
from shapediff.diffusion.guidance import Denoise
from shapediff.diffusion.random import NoiseSource
from shapediff.diffusion.samplers.common import OnStep, Process, steps_of
from shapediff.diffusion.schedule import NoiseSchedule
from shapediff.diffusion.variance import log_variance_gap, log_variance_of_x0

Decoder = Literal["density", "occupancy"]


@dataclass(frozen=True)
class Bound:
    """The three parts of Ho et al. 2020, eq. 5, bits per voxel of each sample, (b,).

    `prior` is L_T, what of x_0 is left at the noisiest timestep; `diffusion` the sum of L_{t-1}; `reconstruction` L_0.
    """

    prior: Float[Tensor, " b"]
    diffusion: Float[Tensor, " b"]
    reconstruction: Float[Tensor, " b"]

    @property
    def total(self) -> Float[Tensor, " b"]:
        """The bound: no less than -log2 p(x_0) per voxel, in expectation over the noise that was drawn."""
        return self.prior + self.diffusion + self.reconstruction


def variational_bound(
    denoise: Denoise,
    x_0: Float[Tensor, "b ..."],
    timesteps: Int[np.ndarray, " steps"],
    *,
    process: Process,
    noise: NoiseSource,
    decoder: Decoder = "occupancy",
    on_step: OnStep | None = None,
) -> Bound:
    """The bound of the chain that visits the falling `timesteps` (all T of them: the model's own), one draw of x_t at each.

    Any subset of the timesteps is a diffusion too, and its bound a bound, if a looser one. The variance of a step is the
    posterior's, beta~, or what the denoiser has learned. `decoder` says what the last one, to x_0, is: "occupancy" gives the
    probability of the two values -1 and 1 that voxels take, "density" that of any real value, whose logarithm may have either
    sign.
    """
    diffusion = x_0.new_zeros(len(x_0))
    for t, t_prev in steps_of(timesteps, on_step):
        step = torch.full((len(x_0),), t, device=x_0.device)
        x_t = q_sample(x_0, noise.normal(*x_0.shape[1:]).to(x_0.dtype), step, schedule=process.schedule)
        found = process.evaluate(denoise, x_t, t)
        if t_prev >= 0:
            to = torch.full_like(step, t_prev)
            fraction = found.variance_fraction
            diffusion = diffusion + step_bits(x_0, found.x_0, step, to, schedule=process.schedule, fraction=fraction)
    std = _std_of_x0(timesteps, found.variance_fraction, process.schedule)
    return Bound(
        prior=prior_bits(x_0, int(timesteps[0]), schedule=process.schedule),
        diffusion=diffusion,
        reconstruction=_DECODERS[decoder](x_0, found.x_0, std),
    )


def prior_bits(x_0: Float[Tensor, "b ..."], t: int, *, schedule: NoiseSchedule) -> Float[Tensor, " b"]:
    """L_T = KL(q(x_T | x_0) || N(0, I)) = (abar (x_0^2 - 1) - log(1 - abar)) / 2 a voxel, here in bits."""
    abar = schedule.abar(torch.tensor(t)).item()
    return _bits(0.5 * (abar * (x_0.square() - 1) - math.log1p(-abar)))


def step_bits(
    x_0: Float[Tensor, "b ..."],
    x_0_hat: Float[Tensor, "b ..."],
    t: Int[Tensor, " b"],
    t_prev: Int[Tensor, " b"],
    *,
    schedule: NoiseSchedule,
    fraction: Float[Tensor, "b ..."] | None = None,
) -> Float[Tensor, " b"]:
    """L_{t-1} = KL(q(x_{t'} | x_t, x_0) || q(x_{t'} | x_t, x_0_hat)) = (SNR' - SNR) (x_0 - x_0_hat)^2 / 2 a voxel, in bits.

    Two Gaussians of the same variance beta~ (Ho et al. 2020, eq. 8), written with the signal-to-noise ratios (Kingma et al.
    2021, sec. 4), where nothing cancels. With a learned variance Sigma = beta~ e^d, d = `fraction` log(beta / beta~), it is
    e^-d times that, plus (d + e^-d - 1) / 2.
    """
    half_snr = 0.5 * (schedule.snr(t_prev) - schedule.snr(t))
    nats = column(half_snr, x_0) * (x_0 - x_0_hat).square()
    if fraction is not None:
        d = fraction * column(log_variance_gap(t, t_prev, schedule=schedule), x_0)
        nats = (-d).exp() * nats + 0.5 * (d + torch.expm1(-d))
    return _bits(nats)


def sampled_bits(
    x_0: Float[Tensor, "b ..."],
    x_0_hat: Float[Tensor, "b ..."],
    fraction: Float[Tensor, "b ..."] | None,
    t: Int[Tensor, " b"],
    *,
    schedule: NoiseSchedule,
    decoder: Decoder = "occupancy",
) -> Float[Tensor, " b"]:
    """T times the term of the full chain that belongs to t, L_{t-1}, or L_0 at t = 0: over uniform t, the bound without L_T.

    `fraction` None is the posterior's variance, as in `variational_bound`. T must be at least 2. What L_0 teaches of the variance
    at t = 0 is never sampled with, so `decoder` matters little.
    """
    # Each term is made harmless where the other is chosen: an infinite one would leave NaN in the gradients all the same.
    step, is_first = t.clamp(min=1), column(t == 0, x_0).bool()
    diffusion = step_bits(x_0, x_0_hat, step, step - 1, schedule=schedule, fraction=fraction)
    first = torch.zeros_like(t)
    if fraction is None:
        std = schedule.sigma(torch.tensor(0))
    else:
        std = (0.5 * log_variance_of_x0(fraction, first, first + 1, schedule=schedule)).exp()
    reconstruction = _DECODERS[decoder](x_0, torch.where(is_first, x_0_hat, x_0), std)
    return schedule.num_timesteps * torch.where(t > 0, diffusion, reconstruction)


def _std_of_x0(timesteps: Int[np.ndarray, " steps"], fraction: Tensor | None, schedule: NoiseSchedule) -> Tensor:
    """The last step's own standard deviation: that of x_0 given x_t alone, sigma = sqrt((1 - abar) / abar), or the learned one.

    beta~ is 0 there, which would make the bound infinite. sigma is right where the data spread much more than sigma. A chain
    of one step has no other beta~ to learn from either, and takes sigma.
    """
    if fraction is None or len(timesteps) < 2:
        return schedule.sigma(torch.tensor(int(timesteps[-1])))
    t_next, t = (torch.full((len(fraction),), int(s), device=fraction.device) for s in timesteps[-2:])
    return (0.5 * log_variance_of_x0(fraction, t, t_next, schedule=schedule)).exp()


def _density_bits(x_0: Tensor, x_0_hat: Tensor, std: Tensor) -> Float[Tensor, " b"]:
    """-log N(x_0; x_0_hat, std^2)."""
    return _bits(0.5 * ((x_0 - x_0_hat) / std).square() + std.log() + 0.5 * math.log(2 * math.pi))


def _occupancy_bits(x_0: Tensor, x_0_hat: Tensor, std: Tensor) -> Float[Tensor, " b"]:
    """-log of the mass of N(x_0_hat, std^2) on x_0's side of 0 (Ho et al. 2020, eq. 13, with two values in place of 256)."""
    return _bits(-torch.special.log_ndtr(x_0.sign() * x_0_hat / std))


def _bits(nats: Float[Tensor, "b ..."]) -> Float[Tensor, " b"]:
    return per_sample_mean(nats) / math.log(2)


_DECODERS = {"density": _density_bits, "occupancy": _occupancy_bits}
