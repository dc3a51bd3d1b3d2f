"""Samplers against closed forms: Gaussian data has a known optimal denoiser, and DDIM through it is a product."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch

from shapediff.diffusion.gaussian import PREDICTIONS, Prediction, training_target
from shapediff.diffusion.random import NoiseSource
from shapediff.diffusion.samplers import Process, build_sampler, sample_ddim, sample_ddpm, timestep_array
from shapediff.diffusion.samplers.common import SPACINGS
from shapediff.diffusion.schedule import NoiseSchedule, NoiseScheduleConfig

SCHEDULE = NoiseScheduleConfig("cosine").build()
STD = 0.3


def optimal_denoiser(
    schedule: NoiseSchedule, prediction: Prediction, *, std: float = STD
) -> Callable[..., torch.Tensor]:
    """The best denoiser of x_0 ~ N(0, std^2): E[x_0 | x_t] = sqrt(abar) std^2 / (abar std^2 + 1 - abar) x_t."""

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        abar = schedule.abar(t).reshape(-1, 1)
        x_0 = abar.sqrt() * std**2 / (abar * std**2 + 1 - abar) * x_t
        eps = (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()
        return training_target(x_0, eps, t, prediction=prediction, schedule=schedule)

    return denoise


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50, 1000])
def test_timestep_arrays_fall_within_range(spacing: str, num_steps: int) -> None:
    steps = timestep_array(1000, num_steps, spacing)
    assert len(steps) == num_steps and bool((np.diff(steps) < 0).all())
    assert steps[-1] >= 0 and steps[0] <= 999
    if spacing != "leading":
        assert steps[0] == 999
    if spacing != "trailing" and num_steps > 1:
        assert steps[-1] == 0
    if num_steps == 1000:
        assert steps.tolist() == list(range(999, -1, -1))


def test_timestep_arrays_as_published() -> None:
    """Lin et al. 2024, table 2, ten of 1000 steps, there counted from 1."""
    assert (timestep_array(1000, 10, "leading") + 1).tolist() == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert (timestep_array(1000, 10, "linspace") + 1).tolist() == [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1]
    assert (timestep_array(1000, 10, "trailing") + 1).tolist() == [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 3, 10, 37, 250])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_of_gaussian_data_is_a_product(spacing: str, num_steps: int, prediction: Prediction) -> None:
    """Every step multiplies x by (a' s a + sqrt(1-a'^2) sqrt(1-a^2)) / (s a^2 + 1 - a^2), s = std^2, a = sqrt(abar)."""
    timesteps = timestep_array(1000, num_steps, spacing)
    factor, s = 1.0, STD**2
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True):
        abar, abar_prev = (SCHEDULE.abar(torch.tensor(int(u))).item() for u in (t, t_prev))
        variance = abar * s + 1 - abar
        factor *= (math.sqrt(abar_prev * abar) * s + math.sqrt((1 - abar_prev) * (1 - abar))) / variance
    x_T = torch.randn(3, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    x_0 = sample_ddim(
        optimal_denoiser(SCHEDULE, prediction),
        x_T,
        timesteps,
        process=Process(SCHEDULE, prediction, clip_x0=False),
        noise=NoiseSource([0, 1, 2]),
    )
    # epsilon divides by sqrt(abar), 5e-5 at the last step of the cosine schedule: up to 5 digits of 16 go there.
    tolerance = 1e-12 if prediction != "epsilon" else 1e-9
    torch.testing.assert_close(x_0, factor * x_T, rtol=tolerance, atol=tolerance)


def test_ddim_converges_to_the_probability_flow() -> None:
    """In the limit of many timesteps DDIM maps x_T to std * x_T (the flow keeps quantiles); the error falls as 1/steps."""
    errors = []
    for num_timesteps in (500, 2000):
        schedule = NoiseScheduleConfig("cosine", num_timesteps=num_timesteps).build()
        x_0 = sample_ddim(
            optimal_denoiser(schedule, "v"),
            torch.ones(1, 1, dtype=torch.float64),
            timestep_array(num_timesteps, num_timesteps),
            process=Process(schedule, "v", clip_x0=False),
            noise=NoiseSource([0]),
        )
        errors.append(abs(x_0.item() - STD))
    assert errors[1] < errors[0] / 3 and errors[1] < 5e-3


@pytest.mark.parametrize(
    "name,eta,num_steps", [("ddpm", 0.0, 1000), ("ddpm", 0.0, 100), ("ddim", 1.0, 100), ("ddim", 0.5, 200)]
)
def test_stochastic_samplers_give_the_variance_of_the_data(name: str, eta: float, num_steps: int) -> None:
    n, width = 4, 5000
    x_0 = build_sampler(name, eta=eta)(
        optimal_denoiser(SCHEDULE, "v"),
        NoiseSource(range(100, 100 + n)).normal(width).double(),
        timestep_array(1000, num_steps),
        process=Process(SCHEDULE, "v", clip_x0=False),
        noise=NoiseSource(range(n)),
    )
    # The chain of 100 steps is off by its own discretisation, well below 6 %; the rest is five standard errors.
    assert abs(x_0.var().item() / STD**2 - 1) < 0.06 + 5 * math.sqrt(2 / (n * width))


def test_ddpm_is_ddim_with_eta_one() -> None:
    x_T = torch.randn(2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    timesteps = timestep_array(1000, 50)
    arguments = (optimal_denoiser(SCHEDULE, "v"), x_T, timesteps)
    process = Process(SCHEDULE, "v", clip_x0=False)
    ddpm = sample_ddpm(*arguments, process=process, noise=NoiseSource([1, 2]))
    ddim = sample_ddim(*arguments, process=process, noise=NoiseSource([1, 2]), eta=1.0)
    torch.testing.assert_close(ddpm, ddim, rtol=1e-9, atol=1e-9)


def test_two_components_come_out_with_their_weights() -> None:
    """x_0 = +1 with probability 0.8, else -1: the optimal denoiser is a tanh, and DDPM must find 80 %."""
    log_odds = math.log(0.8 / 0.2)

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        abar = SCHEDULE.abar(t).reshape(-1, 1)
        return torch.tanh(abar.sqrt() / (1 - abar) * x_t + log_odds / 2)

    n = 20_000
    x_0 = sample_ddpm(
        denoise,
        NoiseSource([0]).normal(n).double(),
        timestep_array(1000, 250),
        process=Process(SCHEDULE, "x0"),
        noise=NoiseSource([1]),
    )
    assert bool((x_0.abs() > 0.99).all())
    assert abs((x_0 > 0).double().mean().item() - 0.8) < 5 * math.sqrt(0.16 / n) + 0.005


def test_clamping_keeps_x0_and_eps_consistent() -> None:
    process = Process(SCHEDULE, "epsilon")
    x_t = torch.full((1, 4), 3.0, dtype=torch.float64)
    found = process.evaluate(lambda x, t: torch.full_like(x, -2.0), x_t, 600)
    abar = SCHEDULE.abar(torch.tensor(600)).item()
    assert found.x_0.tolist() == [[1.0] * 4]
    torch.testing.assert_close(math.sqrt(abar) * found.x_0 + math.sqrt(1 - abar) * found.eps, x_t)


def test_progress_and_refusals() -> None:
    seen: list[tuple[int, int]] = []
    process, noise = Process(SCHEDULE, "v"), NoiseSource([0])
    denoise = optimal_denoiser(SCHEDULE, "v")
    sample_ddim(
        denoise, torch.zeros(1, 2), timestep_array(1000, 3), process=process, noise=noise,
        on_step=lambda done, steps: seen.append((done, steps)),
    )  # fmt: skip
    assert seen == [(1, 3), (2, 3), (3, 3)]
    with pytest.raises(ValueError, match="must fall"):
        sample_ddim(denoise, torch.zeros(1, 2), np.array([5, 5]), process=process, noise=noise)
    with pytest.raises(ValueError, match="eta"):
        sample_ddim(denoise, torch.zeros(1, 2), np.array([5]), process=process, noise=noise, eta=1.5)
    with pytest.raises(ValueError, match="num_steps"):
        timestep_array(1000, 1001)
    with pytest.raises(ValueError, match="ddim"):
        build_sampler("dddim")
    with pytest.raises(ValueError, match="belongs to the sampler ddim"):
        build_sampler("ddpm", eta=0.5)
