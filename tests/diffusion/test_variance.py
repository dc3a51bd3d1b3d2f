"""Learned variances: their ends, their optimum on Gaussian data, and what DDPM makes of them."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from shapediff.diffusion.bound import sampled_bits, step_bits, variational_bound
from shapediff.diffusion.gaussian import posterior
from shapediff.diffusion.random import NoiseSource
from shapediff.diffusion.samplers import SAMPLERS, Process, sample_ddpm, timestep_array
from shapediff.diffusion.schedule import NoiseSchedule, NoiseScheduleConfig
from shapediff.diffusion.variance import log_variance, log_variance_of_x0, split_output
from tests.diffusion.closed_forms import Denoise, gaussian, normal

SCHEDULE = NoiseScheduleConfig("cosine").build()
MEAN, STD = 0.2, 0.3
PAIRS = [(1, 0), (2, 1), (500, 499), (999, 998), (500, 400), (999, 0)]


def _steps(t: int, t_prev: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.tensor([t]), torch.tensor([t_prev])


def _true_variance(t: torch.Tensor, t_prev: torch.Tensor, schedule: NoiseSchedule = SCHEDULE) -> torch.Tensor:
    """Var(x' | x_t) of x_0 ~ N(m, s): beta V' / V with V = abar s + 1 - abar, from x_t = sqrt(alpha) x' + sqrt(beta) z."""
    abar, abar_prev = schedule.abar(t), schedule.abar(t_prev)
    v, v_prev = (a * STD**2 + 1 - a for a in (abar, abar_prev))
    return (1 - abar / abar_prev) * v_prev / v


def _error(t: torch.Tensor, schedule: NoiseSchedule = SCHEDULE) -> torch.Tensor:
    """E (x_0 - x_0_hat)^2 of the best denoiser: s (1 - abar) / (abar s + 1 - abar)."""
    abar = schedule.abar(t)
    return STD**2 * (1 - abar) / (abar * STD**2 + 1 - abar)


@pytest.mark.parametrize(("t", "t_prev"), PAIRS)
def test_the_ends_are_the_posterior_variance_and_beta_of_the_respaced_step(t: int, t_prev: int) -> None:
    step, step_prev = _steps(t, t_prev)
    fraction = torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.float64)
    low, middle, high = log_variance(fraction, step, step_prev, schedule=SCHEDULE)[0].exp()
    x = torch.zeros(1, 1, dtype=torch.float64)
    beta_tilde = posterior(x, x, step, step_prev, schedule=SCHEDULE).variance[0, 0]
    beta = 1 - SCHEDULE.abar(step)[0] / SCHEDULE.abar(step_prev)[0]
    # Differences of numbers near 1 in float64: abar leaves 12 digits of the smallest beta, 4e-5.
    torch.testing.assert_close(low, beta_tilde, rtol=1e-11, atol=0)
    torch.testing.assert_close(high, beta, rtol=1e-11, atol=0)
    torch.testing.assert_close(middle, (low * high).sqrt(), rtol=1e-11, atol=0)


def test_respacing_means_the_betas_of_the_respaced_chain() -> None:
    """As if the chain of every tenth timestep were a schedule of its own (Nichol and Dhariwal 2021, sec. 3.4)."""
    timesteps = torch.arange(9, 1000, 10)
    respaced = NoiseSchedule(SCHEDULE.alphas_cumprod[timesteps])
    index = torch.arange(1, 100)
    fraction = torch.linspace(-0.2, 1.2, 99, dtype=torch.float64)
    ours = log_variance(fraction, timesteps[1:], timesteps[:-1], schedule=SCHEDULE)
    theirs = log_variance(fraction, index, index - 1, schedule=respaced)
    assert torch.equal(ours, theirs)


def test_the_last_step_takes_beta_tilde_from_the_one_above() -> None:
    t, t_next = torch.tensor([0]), torch.tensor([1])
    low, high = log_variance_of_x0(torch.tensor([[0.0, 1.0]], dtype=torch.float64), t, t_next, schedule=SCHEDULE)[
        0
    ].exp()
    above = log_variance(torch.zeros(1, dtype=torch.float64), t_next, t, schedule=SCHEDULE)[0].exp()
    torch.testing.assert_close(low, above, rtol=1e-12, atol=0)
    torch.testing.assert_close(high, SCHEDULE.betas[0], rtol=1e-11, atol=0)


@pytest.mark.parametrize(("t", "t_prev"), PAIRS)
def test_a_step_is_the_divergence_of_two_gaussians(t: int, t_prev: int) -> None:
    x_0, x_0_hat, x_t = (normal(3, 7, seed=seed) for seed in range(3))
    fraction = 0.5 + normal(3, 7, seed=3)
    step, step_prev = torch.full((3,), t), torch.full((3,), t_prev)
    true, modelled = (posterior(x, x_t, step, step_prev, schedule=SCHEDULE) for x in (x_0, x_0_hat))
    std = (0.5 * log_variance(fraction, step, step_prev, schedule=SCHEDULE)).exp()
    nats = torch.distributions.kl_divergence(
        torch.distributions.Normal(true.mean, true.variance.sqrt()), torch.distributions.Normal(modelled.mean, std)
    )
    found = step_bits(x_0, x_0_hat, step, step_prev, schedule=SCHEDULE, fraction=fraction)
    # Their formula cancels where the two variances are nearly one.
    torch.testing.assert_close(found, nats.mean(1) / math.log(2), rtol=1e-6, atol=1e-12)
    lowest = step_bits(x_0, x_0_hat, step, step_prev, schedule=SCHEDULE, fraction=torch.zeros_like(x_0))
    torch.testing.assert_close(lowest, step_bits(x_0, x_0_hat, step, step_prev, schedule=SCHEDULE), rtol=1e-12, atol=0)


def _minimum(bits: object, start: float = 0.5) -> float:
    """The fraction that minimises convex `bits`, by Newton's method."""
    fraction = torch.tensor([[start]], dtype=torch.float64, requires_grad=True)
    for _ in range(50):
        (slope,) = torch.autograd.grad(bits(fraction), fraction, create_graph=True)  # type: ignore[operator]
        (curvature,) = torch.autograd.grad(slope, fraction)
        fraction = (fraction - slope / curvature).detach().requires_grad_()
    return fraction.item()


@pytest.mark.parametrize(("t", "t_prev"), PAIRS)
def test_the_bound_is_least_at_the_true_posterior_variance(t: int, t_prev: int) -> None:
    """Gaussian data, the best mean: L_{t-1} in expectation is that of the mean squared error, being linear in it."""
    step, step_prev = _steps(t, t_prev)
    x_0, x_0_hat = _error(step).sqrt()[:, None], torch.zeros(1, 1, dtype=torch.float64)
    fraction = _minimum(lambda f: step_bits(x_0, x_0_hat, step, step_prev, schedule=SCHEDULE, fraction=f).sum())
    assert 0 <= fraction <= 1
    found = log_variance(torch.tensor([fraction], dtype=torch.float64), step, step_prev, schedule=SCHEDULE).exp()
    torch.testing.assert_close(found, _true_variance(step, step_prev), rtol=1e-9, atol=0)


def test_the_decoder_is_best_at_the_true_variance_of_x0() -> None:
    t = torch.tensor([0])
    x_0, x_0_hat = _error(t).sqrt()[:, None], torch.zeros(1, 1, dtype=torch.float64)
    fraction = _minimum(lambda f: sampled_bits(x_0, x_0_hat, f, t, schedule=SCHEDULE, decoder="density").sum())
    found = log_variance_of_x0(torch.tensor([fraction], dtype=torch.float64), t, t + 1, schedule=SCHEDULE).exp()
    torch.testing.assert_close(found, _error(t), rtol=1e-9, atol=0)


def test_sampled_terms_add_up_to_the_bound_and_have_finite_gradients() -> None:
    """One draw of every t gives, on average, what the walk over all of them sums; L_T, which nothing learns from, apart."""
    schedule = NoiseScheduleConfig("cosine", num_timesteps=20).build()
    t, width = torch.arange(20), 5
    x_0 = normal(1, width).sign().expand(20, -1)
    x_0_hat = 0.9 * x_0
    fraction = (0.3 * torch.ones(20, width, dtype=torch.float64)).requires_grad_()
    terms = sampled_bits(x_0, x_0_hat, fraction, t, schedule=schedule)
    bound = variational_bound(
        lambda x_t, t: torch.cat([x_0_hat[:1], torch.full_like(x_t, 2 * 0.3 - 1)], 1),
        x_0[:1],
        timestep_array(20, 20),
        process=Process(schedule, "x0", variance="learned"),
        noise=NoiseSource([0]),
    )
    torch.testing.assert_close(terms.mean(), (bound.total - bound.prior)[0], rtol=1e-10, atol=0)
    terms.sum().backward()
    assert fraction.grad is not None and bool(fraction.grad.isfinite().all()) and bool((fraction.grad != 0).all())


def _chain_variance(timesteps: list[int]) -> dict[int, float]:
    """By t, the fraction that gives the true posterior variance of the step that the chain makes from there."""
    fractions = {timesteps[-1]: 0.5}
    for t, t_prev in itertools.pairwise(timesteps):
        steps = _steps(t, t_prev)
        zero_one = torch.tensor([0.0, 1.0], dtype=torch.float64)
        low, high = (log_variance(f[None], *steps, schedule=SCHEDULE) for f in zero_one)
        fractions[t] = ((_true_variance(*steps).log() - low) / (high - low)).item()
    return fractions


def _with_variance(denoise: Denoise, fractions: dict[int, float]) -> Denoise:
    """The denoiser with the second half of channels that says these fractions."""
    return lambda x_t, t: torch.cat([denoise(x_t, t), torch.full_like(x_t, 2 * fractions[int(t[0])] - 1)], 1)


@pytest.mark.parametrize("num_steps", [3, 10, 100])
def test_true_variances_make_ddpm_exact_in_any_number_of_steps(num_steps: int) -> None:
    """x_t of the walk has variance abar s + 1 - abar at every entry of the array; with beta~ it has less."""
    timesteps = timestep_array(1000, num_steps).tolist()
    data = gaussian(MEAN, STD)
    fractions = _chain_variance(timesteps)
    abar = SCHEDULE.abar(torch.tensor(timesteps))
    n = num_steps  # as many draws as steps: the start, and one between each two
    start = torch.zeros(n + 1, 1, dtype=torch.float64)
    start[0] = (abar[0] * STD**2 + 1 - abar[0]).sqrt()

    class Impulses:
        """Sample 0 differs from the last by the start, sample i by draw i: their squares add up to the variance."""

        def __init__(self) -> None:
            self.rows = iter(torch.eye(n + 1, dtype=torch.float64)[1:])

        def normal(self, width: int) -> torch.Tensor:
            return next(self.rows)[:, None]

    def variance_of(denoise: Denoise, process: Process) -> float:
        x = sample_ddpm(denoise, start, torch.tensor(timesteps).numpy(), process=process, noise=Impulses())  # type: ignore[arg-type]
        return (x[:-1] - x[-1]).square().sum().item()

    denoise = data.denoiser(SCHEDULE)
    learned = variance_of(_with_variance(denoise, fractions), Process(SCHEDULE, "v", False, variance="learned"))
    # The last step gives x_0_hat, which lacks the variance of x_0 given x_t.
    expected = STD**2 - _error(torch.tensor(timesteps[-1:])).item()
    assert learned == pytest.approx(expected, rel=1e-9)
    assert variance_of(denoise, Process(SCHEDULE, "v", False)) < 0.99 * expected


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_but_ddpm_ignore_the_second_half(name: str) -> None:
    timesteps, denoise = timestep_array(1000, 10), gaussian(MEAN, STD).denoiser(SCHEDULE)
    asked = dict.fromkeys(timesteps.tolist(), 0.7)
    fixed, learned = (
        SAMPLERS[name](
            net, normal(2, 8), timesteps, process=Process(SCHEDULE, "v", variance=variance), noise=NoiseSource([1, 2])
        )
        for net, variance in ((denoise, "fixed"), (_with_variance(denoise, asked), "learned"))
    )
    assert torch.equal(fixed, learned) == (name != "ddpm")


def test_clamping_moves_the_mean_and_leaves_the_variance() -> None:
    output = torch.cat([torch.full((1, 4), -2.0), torch.full((1, 4), 0.4)], 1).double()
    x_t = torch.full((1, 4), 3.0, dtype=torch.float64)
    clipped, plain = (
        Process(SCHEDULE, "epsilon", clip, variance="learned").evaluate(lambda x, t: output, x_t, 600)
        for clip in (True, False)
    )
    assert clipped.x_0.tolist() == [[1.0] * 4] and plain.x_0.min() > 1
    assert clipped.variance_fraction is not None and plain.variance_fraction is not None
    assert torch.equal(clipped.variance_fraction, plain.variance_fraction)
    assert torch.equal(plain.variance_fraction, split_output(output)[1])
    assert plain.variance_fraction.tolist() == [[pytest.approx(0.7)] * 4]


def test_the_bound_of_a_respaced_chain_is_tightest_with_its_true_variances() -> None:
    """Through 10 steps of Gaussian data: less than with beta~, less than with beta, and above the entropy."""
    timesteps, x_0 = timestep_array(1000, 10), MEAN + STD * normal(4, 4000)
    denoise, true = gaussian(MEAN, STD).denoiser(SCHEDULE), _chain_variance(timesteps.tolist())
    ends = {name: dict.fromkeys(true, value) for name, value in (("beta_tilde", 0.0), ("beta", 1.0))}
    found = {
        name: variational_bound(
            _with_variance(denoise, fractions),
            x_0,
            timesteps,
            process=Process(SCHEDULE, "v", False, variance="learned"),
            noise=NoiseSource(range(4)),
            decoder="density",
        )
        for name, fractions in {"true": true, **ends}.items()
    }
    diffusion = {name: bound.diffusion.mean().item() for name, bound in found.items()}
    assert diffusion["true"] < diffusion["beta"] and diffusion["true"] < diffusion["beta_tilde"]
    assert found["true"].total.mean().item() > 0.5 * math.log2(2 * math.pi * math.e * STD**2)
