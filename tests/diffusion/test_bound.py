"""The variational bound: of the best denoiser it comes down to the entropy of the data as the steps grow finer."""

from __future__ import annotations

import math

import pytest
import torch

from shapediff.diffusion.bound import prior_bits, step_bits, variational_bound
from shapediff.diffusion.gaussian import posterior
from shapediff.diffusion.random import NoiseSource
from shapediff.diffusion.samplers import Process, timestep_array
from shapediff.diffusion.schedule import NoiseScheduleConfig
from tests.diffusion.closed_forms import even_log_snr, gaussian, normal

SCHEDULE = NoiseScheduleConfig("cosine").build()
MEAN, STD = 0.2, 0.3


def test_bound_of_gaussian_data_falls_to_its_entropy() -> None:
    """Differential entropy log2(2 pi e s^2) / 2 = 0.310 bits at s = 0.3, between fixed ends of the log SNR."""
    entropy = 0.5 * math.log2(2 * math.pi * math.e * STD**2)
    n, width = 4, 4000
    x_0 = MEAN + STD * normal(n, width)
    # The likelihood of this very sample, in place of the mean over all.
    exact = entropy + 0.5 * math.log2(math.e) * (((x_0 - MEAN) / STD).square().mean().item() - 1)
    gaps = []
    for num_timesteps in (64, 256, 1024):
        schedule = even_log_snr(num_timesteps)
        bound = variational_bound(
            gaussian(MEAN, STD).denoiser(schedule),
            x_0,
            timestep_array(num_timesteps, num_timesteps),
            process=Process(schedule, "v", clip_x0=False),
            noise=NoiseSource(range(n)),
            decoder="density",
        )
        gaps.append(bound.total.mean().item() - exact)
    # A step of h in log SNR loses (e^h - 1 - h) / 2 nats while the noise is below the data's own spread: 1 / T in all. The
    # noise drawn at each step adds a standard error of about h log2(e) / sqrt(2 n) times sqrt(T), 0.005 or less.
    assert 4 < gaps[0] / gaps[1] < 6 and 3.4 < gaps[1] / gaps[2] < 4.9
    assert 0 < gaps[2] < 0.12


def test_bound_is_exact_in_expectation_and_above_the_likelihood() -> None:
    """By the closed form of every term: E (x_0 - x_0_hat)^2 = s^2 (1 - abar) / (abar s^2 + 1 - abar)."""
    num_timesteps, n, width, s = 200, 4, 5000, STD**2
    schedule = NoiseScheduleConfig("linear", num_timesteps=num_timesteps).build()
    t = torch.arange(num_timesteps)
    error = s * (1 - schedule.abar(t)) / (schedule.abar(t) * s + 1 - schedule.abar(t))
    snr = schedule.snr(t)
    diffusion = 0.5 * ((snr[:-1] - snr[1:]) * error[1:]).sum().item() / math.log(2)
    sigma = 1 / snr[0].sqrt().item()
    reconstruction = (error[0].item() / (2 * sigma**2) + math.log(sigma * math.sqrt(2 * math.pi))) / math.log(2)
    bound = variational_bound(
        gaussian(MEAN, STD).denoiser(schedule),
        MEAN + STD * normal(n, width),
        timestep_array(num_timesteps, num_timesteps),
        process=Process(schedule, "v", clip_x0=False),
        noise=NoiseSource(range(n)),
        decoder="density",
    )
    # Sums of correlated squares of 20 000 voxels: well within 3 %.
    assert bound.diffusion.mean().item() == pytest.approx(diffusion, rel=0.03)
    assert bound.reconstruction.mean().item() == pytest.approx(reconstruction, rel=0.03)
    assert diffusion + reconstruction > 0.5 * math.log2(2 * math.pi * math.e * s)


@pytest.mark.parametrize(("name", "num_steps", "slack"), [("cosine", 1000, 0.02), ("cosine", 100, 0.15)])
def test_bound_of_occupancy_is_the_entropy_of_a_coin(name: str, num_steps: int, slack: float) -> None:
    """Voxels full with probability 0.2, each by itself: 0.722 bits a voxel, and fewer timesteps only loosen the bound."""
    n, width = 4, 4000
    schedule = NoiseScheduleConfig(name).build()

    def best(x_t: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """E[x_0 | x_t] of x_0 = 1 with probability 0.2, else -1."""
        abar = schedule.abar(t)[:, None]
        return torch.tanh(abar.sqrt() / (1 - abar) * x_t + math.log(0.2 / 0.8) / 2)

    x_0 = torch.where(torch.arange(width) % 5 == 0, 1.0, -1.0).double().expand(n, -1)
    bound = variational_bound(
        best,
        x_0,
        timestep_array(1000, num_steps),
        process=Process(schedule, "x0"),
        noise=NoiseSource(range(n)),
    )
    entropy = -0.2 * math.log2(0.2) - 0.8 * math.log2(0.8)
    # -log2 p(x_t) of one draw a voxel spreads by about 1 bit.
    five_errors = 5 / math.sqrt(n * width)
    assert -five_errors < bound.total.mean().item() - entropy < slack + five_errors
    assert bound.prior.max() < 1e-6 and bound.reconstruction.max() < 0.01


def test_knowing_the_data_leaves_the_prior_alone() -> None:
    x_0 = normal(2, 50).sign()
    bound = variational_bound(
        lambda x_t, t: x_0,
        x_0,
        timestep_array(1000, 10),
        process=Process(SCHEDULE, "x0"),
        noise=NoiseSource([0, 1]),
    )
    assert bound.diffusion.tolist() == [0, 0]
    torch.testing.assert_close(bound.prior, prior_bits(x_0, 999, schedule=SCHEDULE))


@pytest.mark.parametrize(("t", "t_prev"), [(1, 0), (500, 499), (999, 400)])
def test_a_step_is_the_divergence_of_two_posteriors(t: int, t_prev: int) -> None:
    x_0, x_0_hat, x_t = normal(3, 7), normal(3, 7, seed=1), normal(3, 7, seed=2)
    step, step_prev = torch.full((3,), t), torch.full((3,), t_prev)
    true, modelled = (posterior(x, x_t, step, step_prev, schedule=SCHEDULE) for x in (x_0, x_0_hat))
    nats = (true.mean - modelled.mean).square() / (2 * true.variance)
    found = step_bits(x_0, x_0_hat, step, step_prev, schedule=SCHEDULE)
    torch.testing.assert_close(found, nats.mean(1) / math.log(2), rtol=1e-9, atol=0)


def test_prior_is_the_divergence_from_the_standard_normal() -> None:
    x_0 = normal(3, 7)
    for t in (0, 400, 999):
        abar = SCHEDULE.abar(torch.tensor(t))
        q = torch.distributions.Normal(abar.sqrt() * x_0, (1 - abar).sqrt())
        p = torch.distributions.Normal(torch.zeros_like(x_0), torch.ones_like(x_0))
        nats = torch.distributions.kl_divergence(q, p).mean(1)
        torch.testing.assert_close(prior_bits(x_0, t, schedule=SCHEDULE), nats / math.log(2), rtol=1e-6, atol=1e-12)
    pure = NoiseScheduleConfig("cosine", zero_terminal_snr=True).build()
    assert prior_bits(x_0, 999, schedule=pure).tolist() == [0, 0, 0]
