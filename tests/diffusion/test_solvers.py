"""The deterministic samplers as solvers of the probability-flow ODE, whose solution for Gaussian data is known exactly."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from shapediff.diffusion.random import NoiseSource
from shapediff.diffusion.samplers import SAMPLERS, Process, ddim_inversion, sample_ddim, timestep_array
from shapediff.diffusion.samplers.ddim import ddim_step
from shapediff.diffusion.samplers.dpm_solver import dpm_solver_step
from shapediff.diffusion.samplers.heun import heun_correction
from shapediff.diffusion.schedule import NoiseSchedule, NoiseScheduleConfig
from tests.diffusion.closed_forms import even_log_snr, flow, gaussian, normal, two_clusters

MEAN, STD = 0.4, 0.3
DATA = gaussian(MEAN, STD)
DOUBLINGS = (32, 64, 128, 256)


def _solve(name: str, num_steps: int, *, schedule: NoiseSchedule, spacing: str = "linspace") -> torch.Tensor:
    return SAMPLERS[name](
        DATA.denoiser(schedule),
        torch.tensor([[1.3, -0.7]], dtype=torch.float64),
        timestep_array(schedule.num_timesteps, num_steps, spacing),
        process=Process(schedule, "v", clip_x0=False),
        noise=NoiseSource([0]),
    )


def _orders(name: str, *, schedule: NoiseSchedule, spacing: str = "linspace") -> list[float]:
    """log2 of the ratio of errors at each doubling of the steps; the exact solution keeps quantiles all the way to x_0."""
    x_T, start = torch.tensor([[1.3, -0.7]], dtype=torch.float64), schedule.num_timesteps - 1
    exact = flow(x_T, start, -1, mean=MEAN, std=STD, schedule=schedule)
    errors = [(_solve(name, n, schedule=schedule, spacing=spacing) - exact).abs().max().item() for n in DOUBLINGS]
    return [math.log2(a / b) for a, b in pairwise(errors)]


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize(("name", "low", "high"), [("ddim", 0.9, 1.1), ("dpm_solver", 1.8, 2.3), ("heun", 1.8, 2.3)])
def test_order_of_convergence_in_even_steps_of_log_snr(name: str, low: float, high: float, spacing: str) -> None:
    """2^15 timesteps, so that whole numbers are no limit. Measured: 0.97 to 1.00, 1.96 to 2.05, 2.04 to 2.12."""
    for order in _orders(name, schedule=even_log_snr(), spacing=spacing):
        assert low < order < high


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(("name", "low", "high"), [("ddim", 0.9, 1.1), ("heun", 1.8, 2.3)])
def test_order_of_convergence_on_published_schedules(schedule: str, name: str, low: float, high: float) -> None:
    """Evenly spaced in t. DPM-Solver++ is left out: here its error falls faster still, order 2 to 4, until it changes sign."""
    for order in _orders(name, schedule=NoiseScheduleConfig(schedule, num_timesteps=2**15).build()):
        assert low < order < high


@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize("name", ["dpm_solver", "heun"])
def test_second_order_is_worth_it_in_few_steps(name: str, schedule: str, spacing: str) -> None:
    """At 20 of 1000 steps, a common setting, both are closer to the flow than DDIM, though DDIM has the same timesteps."""
    table = NoiseScheduleConfig(schedule).build()
    exact = flow(torch.tensor([[1.3, -0.7]], dtype=torch.float64), 999, -1, mean=MEAN, std=STD, schedule=table)
    error, error_of_ddim = (
        (_solve(n, 20, schedule=table, spacing=spacing) - exact).abs().max().item() for n in (name, "ddim")
    )
    # Measured: 0.67 for DPM-Solver++ on the linear schedule, 0.53 for Heun there, 0.3 or less on the cosine one.
    assert error < 0.7 * error_of_ddim


@pytest.mark.parametrize("num_steps", [5, 10, 20])
def test_heun_does_not_overshoot_from_the_huge_first_sigma(num_steps: int) -> None:
    """The cosine schedule starts at sigma 2e4: with Heun's correction there too, 10 steps end 1.2 away from the flow."""
    table = NoiseScheduleConfig("cosine").build()
    exact = flow(torch.tensor([[1.3, -0.7]], dtype=torch.float64), 999, -1, mean=MEAN, std=STD, schedule=table)
    # Measured 0.12, 0.04 and 0.013: about 1.5 / steps^1.6.
    assert (_solve("heun", num_steps, schedule=table, spacing="trailing") - exact).abs().max() < 2.5 / num_steps**1.6


def test_dpm_solver_takes_no_long_step_on_short_evidence() -> None:
    """ "linspace" ends in a step of log SNR many times the one before; extrapolated over it, 16 steps are worse than DDIM."""
    table = NoiseScheduleConfig("cosine").build()
    exact = flow(torch.tensor([[1.3, -0.7]], dtype=torch.float64), 999, -1, mean=MEAN, std=STD, schedule=table)
    error = (_solve("dpm_solver", 16, schedule=table) - exact).abs().max().item()
    # Measured 0.022; the same with every step of second order: 0.096.
    assert error < 0.03


def test_dpm_solver_of_first_order_is_ddim() -> None:
    schedule, x_t = NoiseScheduleConfig("cosine").build(), normal(3, 4)
    process = Process(schedule, "v", clip_x0=False)
    for t, t_prev in ((999, 700), (500, 3), (40, -1)):
        found = process.evaluate(DATA.denoiser(schedule), x_t, t)
        one = dpm_solver_step(x_t, found.x_0, t, t_prev, schedule=schedule)
        torch.testing.assert_close(one, ddim_step(found, t_prev, schedule=schedule), rtol=1e-11, atol=1e-11)


def test_heun_step_is_the_trapezoid_in_sigma() -> None:
    """x'/sqrt(abar') = x/sqrt(abar) + (sigma' - sigma) (eps + eps') / 2, with eps' at Euler's point."""
    schedule, x_t, t, t_prev = NoiseScheduleConfig("cosine").build(), normal(3, 4), 600, 400
    process = Process(schedule, "v", clip_x0=False)
    denoise = DATA.denoiser(schedule)
    found = process.evaluate(denoise, x_t, t)
    euler = ddim_step(found, t_prev, schedule=schedule)
    eps_prev = process.evaluate(denoise, euler, t_prev).eps
    abar, abar_prev = schedule.abar(torch.tensor([t, t_prev]))
    sigma, sigma_prev = (((1 - a) / a).sqrt() for a in (abar, abar_prev))
    expected = abar_prev.sqrt() * (x_t / abar.sqrt() + (sigma_prev - sigma) * (found.eps + eps_prev) / 2)
    heun = euler + heun_correction(found.eps, eps_prev, t, t_prev, schedule=schedule)
    torch.testing.assert_close(heun, expected, rtol=1e-12, atol=1e-12)


def test_inversion_comes_back_with_an_error_that_falls_as_one_over_steps() -> None:
    """x_0 up and down again, on a mixture, where the flow is no scaling."""
    schedule, data = NoiseScheduleConfig("cosine").build(), two_clusters(std=0.3)
    process, denoise = Process(schedule, "v", clip_x0=False), data.denoiser(schedule)
    x_0 = data.means[[0, 1, 1, 1]] + 0.3 * normal(4, 2)
    errors = []
    for num_steps in (25, 50, 100, 200):
        timesteps = timestep_array(1000, num_steps)
        x_T = ddim_inversion(denoise, x_0, timesteps, process=process)
        back = sample_ddim(denoise, x_T, timesteps, process=process, noise=NoiseSource(range(4)))
        errors.append((back - x_0).abs().max().item())
    for order in (math.log2(a / b) for a, b in pairwise(errors)):
        assert 0.8 < order < 1.3
    assert errors[-1] < 0.02


def test_inversion_goes_where_the_flow_goes() -> None:
    schedule = NoiseScheduleConfig("cosine", num_timesteps=4000).build()
    x_0 = MEAN + STD * normal(2, 3)
    seen: list[tuple[int, int]] = []
    x_T = ddim_inversion(
        DATA.denoiser(schedule), x_0, timestep_array(4000, 2000), process=Process(schedule, "v", clip_x0=False),
        on_step=lambda done, steps: seen.append((done, steps)),
    )  # fmt: skip
    exact = flow(x_0, -1, 3999, mean=MEAN, std=STD, schedule=schedule)
    # First order in 2000 steps; x_T is of size 1.
    torch.testing.assert_close(x_T, exact, rtol=0, atol=5e-3)
    assert seen[0] == (1, 2000) and seen[-1] == (2000, 2000)


def test_inversion_reaches_pure_noise_and_refuses_what_does_not_fall() -> None:
    schedule = NoiseScheduleConfig("cosine", zero_terminal_snr=True).build()
    process = Process(schedule, "v", clip_x0=False)
    x_T = ddim_inversion(
        DATA.denoiser(schedule), MEAN + STD * normal(8, 500), timestep_array(1000, 200), process=process
    )
    # One to its own discretisation: N(0, 1) is where the flow takes the data.
    assert abs(x_T.mean()) < 0.08 and abs(x_T.std() - 1) < 0.05
    with pytest.raises(ValueError, match="must fall"):
        ddim_inversion(DATA.denoiser(schedule), normal(1, 2), np.array([3, 7]), process=process)
