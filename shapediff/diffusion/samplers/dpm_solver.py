"""DPM-Solver++(2M) (Lu et al. 2022, "DPM-Solver++", algorithm 2)."""

from __future__ import annotations

import math

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from shapediff.diffusion.guidance import Denoise
from shapediff.diffusion.random import Noise
from shapediff.diffusion.samplers.common import OnStep, Process, steps_of
from shapediff.diffusion.schedule import NoiseSchedule

MAX_STEP_RATIO = 2.0


def dpm_solver_step(
    x_t: Float[Tensor, "b ..."], data: Float[Tensor, "b ..."], t: int, t_prev: int, *, schedule: NoiseSchedule
) -> Float[Tensor, "b ..."]:
    """sigma'/sigma x_t - alpha' (e^-h - 1) data (Lu et al. 2022, algorithm 2), alpha = sqrt(abar), sigma = sqrt(1 - abar).

    `data` is x_0 for a step of first order, which is DDIM's, or x_0 extrapolated to the middle of the step. e^-h is
    alpha sigma' / (alpha' sigma), so that nothing is infinite at abar = 0 nor at t_prev = -1.
    """
    signal, signal_prev = schedule.abar(torch.tensor([t, t_prev])).sqrt().tolist()
    noise, noise_prev = schedule.noise_level(torch.tensor([t, t_prev])).tolist()
    return (noise_prev / noise) * x_t + (signal_prev - signal * noise_prev / noise) * data


def log_snr_step(t: int, t_prev: int, *, schedule: NoiseSchedule) -> float:
    """h = lambda' - lambda, lambda = log(alpha / sigma); infinite from pure noise and to clean data."""
    sigma, sigma_prev = schedule.sigma(torch.tensor([t, t_prev])).log().tolist()
    return sigma - sigma_prev


def sample_dpm_solver(
    denoise: Denoise,
    x_T: Float[Tensor, "b ..."],
    timesteps: Int[np.ndarray, " steps"],
    *,
    process: Process,
    noise: Noise,
    on_step: OnStep | None = None,
    t_end: int = -1,
) -> Float[Tensor, "b ..."]:
    """Walk `timesteps` with x_0 extrapolated from this and the last evaluation; draws no noise.

    The first step is of first order, as nothing came before it, and so is the last, to clean data, where h is infinite:
    what other code switches on for few steps as `lower_order_final`. Unlike the published algorithm, so is every step more
    than MAX_STEP_RATIO times the one before: it would extrapolate further than it has seen, as at the end of "linspace".
    """
    x_t, x_0_last, h_last = x_T, x_T, math.inf
    for t, t_prev in steps_of(timesteps, on_step, t_end):
        x_0 = process.evaluate(denoise, x_t, t).x_0
        h = log_snr_step(t, t_prev, schedule=process.schedule)
        is_second_order = math.isfinite(h_last) and h <= MAX_STEP_RATIO * h_last
        data = x_0 + h / (2 * h_last) * (x_0 - x_0_last) if is_second_order else x_0
        x_t = dpm_solver_step(x_t, data, t, t_prev, schedule=process.schedule)
        x_0_last, h_last = x_0, h
    return x_t
