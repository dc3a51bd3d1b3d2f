"""DDIM run upward, from data to the noise that gives it back (Dhariwal and Nichol 2021, app. F)."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from shapediff.diffusion.gaussian import q_sample
from shapediff.diffusion.guidance import Denoise
from shapediff.diffusion.samplers.common import OnStep, Process, reported, step_pairs
from shapediff.diffusion.samplers.ddim import ddim_step


def ddim_inversion(
    denoise: Denoise,
    x_0: Float[Tensor, "b ..."],
    timesteps: Int[np.ndarray, " steps"],
    *,
    process: Process,
    on_step: OnStep | None = None,
) -> Float[Tensor, "b ..."]:
    """x_T from which DDIM along the same falling `timesteps` returns to x_0, up to an error that falls as 1 / steps.

    Each step evaluates at the entry it leaves and goes to the next one up: x_{t'} = sqrt(abar') x_0_hat + sqrt(1 - abar') eps.
    The first leaves clean data, where the denoiser was never trained: it takes eps from the lowest entry, and x_0 as it is.
    """
    x_t = x_0
    for t, t_prev in reported(step_pairs(timesteps)[::-1], on_step):
        if t_prev >= 0:
            x_t = ddim_step(process.evaluate(denoise, x_t, t_prev), t, schedule=process.schedule)
        else:
            eps = process.evaluate(denoise, x_0, t).eps
            x_t = q_sample(x_0, eps, torch.full((len(x_0),), t, device=x_0.device), schedule=process.schedule)
    return x_t
