"""Samplers against closed forms: through the best denoiser of Gaussian data, every step is affine and known."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shapediff.diffusion.gaussian import PREDICTIONS, Prediction
from shapediff.diffusion.random import NoiseSource
from shapediff.diffusion.samplers import SAMPLERS, Process, build_sampler, sample_ddim, sample_ddpm, timestep_array
from shapediff.diffusion.samplers.common import SPACINGS
from shapediff.diffusion.schedule import NoiseScheduleConfig
from tests.diffusion.closed_forms import gaussian, normal, two_clusters

SCHEDULE = NoiseScheduleConfig("cosine").build()
MEAN, STD = 0.2, 0.3
DATA = gaussian(MEAN, STD)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 2, 7, 50, 1000])
def test_timestep_arrays_start_and_end_where_they_say(spacing: str, num_steps: int) -> None:
    steps = timestep_array(1000, num_steps, spacing)
    if spacing != "leading":
        assert steps[0] == 999
    if spacing != "trailing" and num_steps > 1:
        assert steps[-1] == 0
    if num_steps == 1000:
        assert steps.tolist() == list(range(999, -1, -1))


@pytest.mark.parametrize("spacing", SPACINGS)
def test_timestep_arrays_fall_for_every_number_of_steps(spacing: str) -> None:
    for num_timesteps in (*range(1, 40), 250, 1000):
        for num_steps in range(1, num_timesteps + 1):
            steps = timestep_array(num_timesteps, num_steps, spacing)
            assert len(steps) == num_steps and bool((np.diff(steps) < 0).all())
            assert steps[-1] >= 0 and steps[0] < num_timesteps


def test_timestep_arrays_as_published() -> None:
    """Lin et al. 2024, table 2, ten of 1000 steps, there counted from 1."""
    assert (timestep_array(1000, 10, "leading") + 1).tolist() == [901, 801, 701, 601, 501, 401, 301, 201, 101, 1]
    assert (timestep_array(1000, 10, "linspace") + 1).tolist() == [1000, 889, 778, 667, 556, 445, 334, 223, 112, 1]
    assert (timestep_array(1000, 10, "trailing") + 1).tolist() == [1000, 900, 800, 700, 600, 500, 400, 300, 200, 100]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("num_steps", [1, 3, 10, 37, 250])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_ddim_of_gaussian_data_is_a_product(spacing: str, num_steps: int, prediction: Prediction) -> None:
    """x - a m is multiplied by (a' s a + sqrt(1-a'^2) sqrt(1-a^2)) / (s a^2 + 1 - a^2), s = std^2, a = sqrt(abar)."""
    timesteps = timestep_array(1000, num_steps, spacing)
    factor, s = 1.0, STD**2
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True):
        abar, abar_prev = (SCHEDULE.abar(torch.tensor(int(u))).item() for u in (t, t_prev))
        variance = abar * s + 1 - abar
        factor *= (math.sqrt(abar_prev * abar) * s + math.sqrt((1 - abar_prev) * (1 - abar))) / variance
    x_T = normal(3, 5)
    x_0 = sample_ddim(
        DATA.denoiser(SCHEDULE, prediction),
        x_T,
        timesteps,
        process=Process(SCHEDULE, prediction, clip_x0=False),
        noise=NoiseSource([0, 1, 2]),
    )
    signal = math.sqrt(SCHEDULE.abar(torch.tensor(int(timesteps[0]))).item())
    # epsilon divides by sqrt(abar), 5e-5 at the last step of the cosine schedule: up to 5 digits of 16 go there.
    tolerance = 1e-12 if prediction != "epsilon" else 1e-9
    torch.testing.assert_close(x_0, MEAN + factor * (x_T - signal * MEAN), rtol=tolerance, atol=tolerance)


class _OneStream:
    """Noise of a whole batch from one generator: a generator a sample is slow for twenty thousand of them."""

    def __init__(self, num: int) -> None:
        self.num, self.generator = num, torch.Generator().manual_seed(1)

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(self.num, *shape, generator=self.generator)


class _Impulses:
    """Noise that is 1 for sample i at draw i and else 0: sample i tells what draw i does, the one after the last the mean."""

    def __init__(self, num_draws: int) -> None:
        self.rows = iter(torch.eye(num_draws + 1, dtype=torch.float64)[:num_draws])

    def normal(self, width: int) -> torch.Tensor:
        return next(self.rows)[:, None].expand(-1, width)


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize(("name", "eta"), [("ddpm", 1.0), ("ddim", 1.0), ("ddim", 0.4)])
def test_stochastic_samplers_follow_their_recursion_of_mean_and_variance(name: str, eta: float, spacing: str) -> None:
    """Every step is x' = A x + B + sigma z, so mean' = A mean + B and variance' = A^2 variance + sigma^2."""
    timesteps = timestep_array(1000, 25, spacing)
    mean, variance, s = 0.7, 0.0, STD**2
    for t, t_prev in zip(timesteps, [*timesteps[1:], -1], strict=True):
        abar, abar_prev = (SCHEDULE.abar(torch.tensor(int(u))).item() for u in (t, t_prev))
        sigma = eta * math.sqrt((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev))
        gain = math.sqrt(abar) * s / (abar * s + 1 - abar)
        to_eps = math.sqrt(max(1 - abar_prev - sigma**2, 0)) / math.sqrt(1 - abar)
        # x_0_hat = gain x + (1 - gain sqrt(abar)) m, eps_hat = (x - sqrt(abar) x_0_hat) / sqrt(1 - abar).
        per_x_0 = math.sqrt(abar_prev) - to_eps * math.sqrt(abar)
        slope = per_x_0 * gain + to_eps
        mean = slope * mean + per_x_0 * (1 - gain * math.sqrt(abar)) * MEAN
        variance = slope**2 * variance + sigma**2
    num_draws = len(timesteps) - 1  # none in the last step, to clean data
    x_0 = build_sampler(name, eta=0.0 if name == "ddpm" else eta)(
        DATA.denoiser(SCHEDULE),
        torch.full((num_draws + 1, 1), 0.7, dtype=torch.float64),
        timesteps,
        process=Process(SCHEDULE, "v", clip_x0=False),
        noise=_Impulses(num_draws),
    )
    assert x_0[-1].item() == pytest.approx(mean, abs=1e-12)
    assert (x_0[:-1] - x_0[-1]).square().sum().item() == pytest.approx(variance, rel=1e-10)


@pytest.mark.parametrize(
    "name,eta,num_steps", [("ddpm", 0.0, 1000), ("ddpm", 0.0, 100), ("ddim", 1.0, 100), ("ddim", 0.5, 200)]
)
def test_stochastic_samplers_give_the_variance_of_the_data(name: str, eta: float, num_steps: int) -> None:
    n, width = 4, 5000
    x_0 = build_sampler(name, eta=eta)(
        DATA.denoiser(SCHEDULE),
        NoiseSource(range(100, 100 + n)).normal(width).double(),
        timestep_array(1000, num_steps),
        process=Process(SCHEDULE, "v", clip_x0=False),
        noise=NoiseSource(range(n)),
    )
    # The chain of 100 steps is off by its own discretisation, well below 6 %; the rest is five standard errors.
    assert abs(x_0.var().item() / STD**2 - 1) < 0.06 + 5 * math.sqrt(2 / (n * width))


def test_ddpm_is_ddim_with_eta_one() -> None:
    arguments = (DATA.denoiser(SCHEDULE), normal(2, 8), timestep_array(1000, 50))
    process = Process(SCHEDULE, "v", clip_x0=False)
    ddpm = sample_ddpm(*arguments, process=process, noise=NoiseSource([1, 2]))
    ddim = sample_ddim(*arguments, process=process, noise=NoiseSource([1, 2]), eta=1.0)
    torch.testing.assert_close(ddpm, ddim, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("clip_x0", [True, False])
@pytest.mark.parametrize("name", SAMPLERS)
def test_two_clusters_come_out_with_their_weights_and_moments(name: str, clip_x0: bool) -> None:
    n, data = 20_000, two_clusters()
    x_0 = SAMPLERS[name](
        data.denoiser(SCHEDULE),
        normal(n, 2),
        timestep_array(1000, 200),
        process=Process(SCHEDULE, "v", clip_x0=clip_x0),
        noise=_OneStream(n),
    )
    # The seam between the clusters is far from both, 8 and 5 standard deviations.
    cluster = (x_0[:, 0] > 0).long()
    share = cluster.double().mean().item()
    assert abs(share - 0.75) < 5 * math.sqrt(0.75 * 0.25 / n)
    # Two hundred steps leave the variance too small, by this much through a single Gaussian of the same std.
    bias = {"ddim": 0.075, "ddpm": 0.146, "dpm_solver": 0.015, "heun": 0.024}[name]
    for k in range(2):
        found = x_0[cluster == k]
        five_errors = 5 / math.sqrt(len(found))
        torch.testing.assert_close(found.mean(0), data.means[k], rtol=0, atol=five_errors * data.std)
        # The relative standard error of a variance is sqrt(2 / n).
        assert abs(found.var(0) / data.std**2 - 1).max() < five_errors * math.sqrt(2) + bias
        assert abs(torch.corrcoef(found.T)[0, 1]) < five_errors


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction", ["v", "x0"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 50])
def test_samplers_start_from_pure_noise(name: str, prediction: Prediction, num_steps: int) -> None:
    """From abar_T = 0, where sigma and log SNR are infinite: finite, and one step gives the mean of the data."""
    schedule = NoiseScheduleConfig("cosine", zero_terminal_snr=True).build()
    x_0 = SAMPLERS[name](
        DATA.denoiser(schedule, prediction),
        normal(4, 500),
        timestep_array(1000, num_steps),
        process=Process(schedule, prediction, clip_x0=False),
        noise=NoiseSource(range(4)),
    )
    if num_steps == 1:
        torch.testing.assert_close(x_0, torch.full_like(x_0, MEAN), rtol=1e-12, atol=1e-12)
    if num_steps == 50:
        assert abs(x_0.mean() - MEAN) < 5 * STD / math.sqrt(2000)
        # Five standard errors, and DDPM's discretisation at 50 steps.
        assert abs(x_0.std() / STD - 1) < 5 / math.sqrt(4000) + 0.1
    assert bool(x_0.isfinite().all())


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_denoiser_is_asked_at_the_timesteps_of_the_array_alone(name: str) -> None:
    asked: list[int] = []
    best = DATA.denoiser(SCHEDULE)

    def denoise(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        assert t.dtype == torch.int64
        asked.append(int(t[0]))
        return best(x_t, t)

    timesteps = timestep_array(1000, 7)
    seen: list[tuple[int, int]] = []
    SAMPLERS[name](
        denoise, normal(1, 2), timesteps, process=Process(SCHEDULE, "v"), noise=NoiseSource([0]),
        on_step=lambda done, steps: seen.append((done, steps)),
    )  # fmt: skip
    assert seen == [(i, 7) for i in range(1, 8)]
    assert sorted(set(asked), reverse=True) == timesteps.tolist()
    # Heun asks twice but for the first and the last step.
    assert len(asked) == (12 if name == "heun" else 7)


def test_clamping_keeps_x0_and_eps_consistent() -> None:
    process = Process(SCHEDULE, "epsilon")
    x_t = torch.full((1, 4), 3.0, dtype=torch.float64)
    found = process.evaluate(lambda x, t: torch.full_like(x, -2.0), x_t, 600)
    abar = SCHEDULE.abar(torch.tensor(600)).item()
    assert found.x_0.tolist() == [[1.0] * 4]
    torch.testing.assert_close(math.sqrt(abar) * found.x_0 + math.sqrt(1 - abar) * found.eps, x_t)


def test_refusals() -> None:
    process, noise, denoise = Process(SCHEDULE, "v"), NoiseSource([0]), DATA.denoiser(SCHEDULE)
    for sampler in SAMPLERS.values():
        with pytest.raises(ValueError, match="must fall"):
            sampler(denoise, torch.zeros(1, 2), np.array([5, 5]), process=process, noise=noise)
    with pytest.raises(ValueError, match="eta"):
        sample_ddim(denoise, torch.zeros(1, 2), np.array([5]), process=process, noise=noise, eta=1.5)
    with pytest.raises(ValueError, match="num_steps"):
        timestep_array(1000, 1001)
    with pytest.raises(ValueError, match="ddim"):
        build_sampler("dddim")
    with pytest.raises(ValueError, match="belongs to the sampler ddim"):
        build_sampler("ddpm", eta=0.5)
    with pytest.raises(ValueError, match="eta="):
        build_sampler("ddim", eta=1.5)
    with pytest.raises(ValueError, match="pure noise"):
        Process(NoiseScheduleConfig("cosine", zero_terminal_snr=True).build(), "epsilon")
