"""DDPM ancestral sampling (Ho et al. 2020, algorithm 2), on the full chain or a respaced one."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from shapediff.diffusion.gaussian import posterior
from shapediff.diffusion.guidance import Denoise
from shapediff.diffusion.random import Noise
from shapediff.diffusion.samplers.common import OnStep, Process, steps_of
from shapediff.diffusion.variance import log_variance


def sample_ddpm(
    denoise: Denoise,
    x_T: Float[Tensor, "b ..."],
    timesteps: Int[np.ndarray, " steps"],
    *,
    process: Process,
    noise: Noise,
    on_step: OnStep | None = None,
    t_end: int = -1,
) -> Float[Tensor, "b ..."]:
    """Draw x_{t-1} from q(x_{t-1} | x_t, x_0_hat) down the chain, with the posterior variance beta~ (Ho et al. 2020, eq. 7).

    A learned variance takes the place of beta~, between the beta~ and the beta of the respaced chain.
    """
    x_t = x_T
    for t, t_prev in steps_of(timesteps, on_step, t_end):
        found = process.evaluate(denoise, x_t, t)
        step, step_prev = (torch.full((len(x_t),), s, device=x_t.device) for s in (t, t_prev))
        q = posterior(found.x_0, x_t, step, step_prev, schedule=process.schedule)
        x_t = q.mean
        if t_prev >= 0:
            fraction = found.variance_fraction
            std = q.variance.sqrt()
            if fraction is not None:
                std = (0.5 * log_variance(fraction, step, step_prev, schedule=process.schedule)).exp()
            x_t = x_t + std * noise.normal(*x_t.shape[1:]).to(x_t.dtype)
    return x_t
