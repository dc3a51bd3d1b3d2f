"""Heun's method on the probability-flow ODE (Karras et al. 2022, algorithm 1)."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from shapediff.diffusion.guidance import Denoise
from shapediff.diffusion.random import Noise
from shapediff.diffusion.samplers.common import OnStep, Process, steps_of
from shapediff.diffusion.samplers.ddim import ddim_step
from shapediff.diffusion.schedule import NoiseSchedule


def heun_correction(
    eps: Float[Tensor, "b ..."], eps_prev: Float[Tensor, "b ..."], t: int, t_prev: int, *, schedule: NoiseSchedule
) -> Float[Tensor, "b ..."]:
    """What the mean of both slopes adds to Euler's x_{t'}: sqrt(abar') (sigma' - sigma) (eps' - eps) / 2.

    In x / sqrt(abar) = x_0 + sigma eps the flow is d(x / sqrt(abar)) = eps d sigma, Euler's step is DDIM's, and Heun's takes
    (eps + eps') / 2 in place of eps (Karras et al. 2022, algorithm 1, line 8).
    """
    sigma, sigma_prev = schedule.sigma(torch.tensor([t, t_prev])).tolist()
    signal_prev = math.sqrt(schedule.abar(torch.tensor(t_prev)).item())
    return 0.5 * signal_prev * (sigma_prev - sigma) * (eps_prev - eps)


def sample_heun(
    denoise: Denoise,
    x_T: Float[Tensor, "b ..."],
    timesteps: Int[np.ndarray, " steps"],
    *,
    process: Process,
    noise: Noise,
    on_step: OnStep | None = None,
    t_end: int = -1,
) -> Float[Tensor, "b ..."]:
    """Walk `timesteps` by Heun's method without churn, asking the denoiser twice a step; draws no noise.

    Unlike the published algorithm the first step, as the last, is Euler's. The first one comes from sigma of 100 to infinity
    down to sigma': while x_0 is still all but unknown its slope falls as 1 / sigma, and the mean of both slopes overshoots
    the true correction by the factor sigma / sigma'. Euler's error there is of order 1 / sigma'^2, so the order stays two.
    """
    x_t, is_first = x_T, True
    for t, t_prev in steps_of(timesteps, on_step, t_end):
        found = process.evaluate(denoise, x_t, t)
        x_t = ddim_step(found, t_prev, schedule=process.schedule)
        if not is_first and t_prev >= 0:
            eps_prev = process.evaluate(denoise, x_t, t_prev).eps
            x_t = x_t + heun_correction(found.eps, eps_prev, t, t_prev, schedule=process.schedule)
        is_first = False
    return x_t
