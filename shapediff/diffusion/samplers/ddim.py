"""DDIM (Song, Meng and Ermon 2021)."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from shapediff.diffusion.gaussian import Denoised
from shapediff.diffusion.guidance import Denoise
from shapediff.diffusion.random import Noise
from shapediff.diffusion.samplers.common import OnStep, Process, steps_of
from shapediff.diffusion.schedule import NoiseSchedule


def ddim_sigma(t: int, t_prev: int, *, schedule: NoiseSchedule, eta: float) -> float:
    """sigma = eta sqrt((1 - abar') / (1 - abar)) sqrt(1 - abar / abar') (Song et al. 2021, eq. 16)."""
    abar, abar_prev = schedule.abar(torch.tensor([t, t_prev])).tolist()
    return eta * math.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))


def ddim_step(found: Denoised, t_prev: int, *, schedule: NoiseSchedule, sigma: float = 0.0) -> Float[Tensor, "b ..."]:
    """The mean of x_{t'}: sqrt(abar') x_0 + sqrt(1 - abar' - sigma^2) eps (Song et al. 2021, eq. 12).

    t_prev is the *next entry of the timestep array*, not t - stride; -1 means clean data (abar' = 1).
    """
    abar_prev = schedule.abar(torch.tensor(t_prev)).item()
    # The clamp takes off the rounding error at t_prev = -1 only: sigma^2 <= 1 - abar' for every eta <= 1.
    return math.sqrt(abar_prev) * found.x_0 + math.sqrt(max(1 - abar_prev - sigma**2, 0.0)) * found.eps


def sample_ddim(
    denoise: Denoise,
    x_T: Float[Tensor, "b ..."],
    timesteps: Int[np.ndarray, " steps"],
    *,
    process: Process,
    noise: Noise,
    eta: float = 0.0,
    on_step: OnStep | None = None,
    t_end: int = -1,
) -> Float[Tensor, "b ..."]:
    """Walk `timesteps` by DDIM; eta = 0 is deterministic, eta = 1 is DDPM on the respaced chain.

    Raises ValueError for eta outside [0, 1].
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must lie in [0, 1]")
    x_t = x_T
    for t, t_prev in steps_of(timesteps, on_step, t_end):
        sigma = ddim_sigma(t, t_prev, schedule=process.schedule, eta=eta)
        x_t = ddim_step(process.evaluate(denoise, x_t, t), t_prev, schedule=process.schedule, sigma=sigma)
        if sigma > 0:
            x_t = x_t + sigma * noise.normal(*x_t.shape[1:]).to(x_t.dtype)
    return x_t
