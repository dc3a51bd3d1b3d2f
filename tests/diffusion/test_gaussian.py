"""The algebra of x_0, eps, v and x_t, the posterior, the score, the loss weights and class dropout."""

from __future__ import annotations

import pytest
import torch

from shapediff.diffusion.gaussian import PREDICTIONS, denoised, posterior, q_sample, score, training_target
from shapediff.diffusion.loss import WEIGHTINGS, Weighting, drop_labels, loss_weight, squared_error
from shapediff.diffusion.random import NoiseSource
from shapediff.diffusion.schedule import NoiseScheduleConfig
from tests.diffusion.closed_forms import two_clusters

SCHEDULE = NoiseScheduleConfig("cosine", log_snr_shift=-1.0).build()


def _draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("shape", [(7,), (4, 3, 2)])
def test_the_target_tells_x0_and_eps_exactly(prediction: str, shape: tuple[int, ...]) -> None:
    t = torch.tensor([0, 1, 500, 990])
    x_0, eps = _draw(4, *shape), _draw(4, *shape, seed=1)
    x_t = q_sample(x_0, eps, t, schedule=SCHEDULE)
    target = training_target(x_0, eps, t, prediction=prediction, schedule=SCHEDULE)
    found = denoised(target, x_t, t, prediction=prediction, schedule=SCHEDULE)
    # At t = 990 the signal is 1e-2 of x_t: two digits of float64 go.
    torch.testing.assert_close(found.x_0, x_0, rtol=0, atol=1e-11)
    torch.testing.assert_close(found.eps, eps, rtol=0, atol=1e-11)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_whatever_the_output_x0_and_eps_explain_x_t(prediction: str) -> None:
    t = torch.tensor([3, 400, 900])
    x_t, output = _draw(3, 5), _draw(3, 5, seed=1)
    found = denoised(output, x_t, t, prediction=prediction, schedule=SCHEDULE)
    torch.testing.assert_close(q_sample(found.x_0, found.eps, t, schedule=SCHEDULE), x_t, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("prediction", ["x0", "v"])
def test_pure_noise_still_tells_x0_and_eps(prediction: str) -> None:
    schedule = NoiseScheduleConfig("cosine", zero_terminal_snr=True).build()
    t = torch.full((4,), 999)
    x_0, eps = _draw(4, 7), _draw(4, 7, seed=1)
    x_t = q_sample(x_0, eps, t, schedule=schedule)
    assert torch.equal(x_t, eps)
    target = training_target(x_0, eps, t, prediction=prediction, schedule=schedule)
    found = denoised(target, x_t, t, prediction=prediction, schedule=schedule)
    assert torch.equal(found.x_0, x_0)
    assert torch.equal(found.eps, eps)


def test_score_is_the_gradient_of_the_log_density() -> None:
    data, t = two_clusters(std=0.3), torch.tensor([0, 20, 500, 950])
    abar = SCHEDULE.abar(t)[:, None]
    x_t = _draw(4, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(data.log_density(x_t, abar).sum(), x_t)
    eps = (x_t - abar.sqrt() * data.x_0_hat(x_t, abar)) / (1 - abar).sqrt()
    torch.testing.assert_close(score(eps.detach(), t, schedule=SCHEDULE), gradient, rtol=1e-8, atol=1e-10)


def test_forward_process_has_the_stated_moments() -> None:
    n = 200_000
    t = torch.full((n,), 300)
    x_t = q_sample(torch.full((n, 1), 0.7, dtype=torch.float64), _draw(n, 1), t, schedule=SCHEDULE)
    abar = SCHEDULE.abar(t[:1]).item()
    # Five standard errors of the mean and of the variance.
    assert abs(x_t.mean().item() - abar**0.5 * 0.7) < 5 * ((1 - abar) / n) ** 0.5
    assert abs(x_t.var().item() - (1 - abar)) < 5 * (1 - abar) * (2 / n) ** 0.5


def test_posterior_is_bayes_rule() -> None:
    """q(x_prev | x_t, x_0) from the product of two Gaussians in x_prev, worked out by hand."""
    t, t_prev = torch.tensor([700]), torch.tensor([430])
    x_0, x_t = _draw(1, 6), _draw(1, 6, seed=1)
    abar, abar_prev = (SCHEDULE.abar(s).item() for s in (t, t_prev))
    alpha = abar / abar_prev
    precision = alpha / (1 - alpha) + 1 / (1 - abar_prev)
    mean = (alpha**0.5 * x_t / (1 - alpha) + abar_prev**0.5 * x_0 / (1 - abar_prev)) / precision
    q = posterior(x_0, x_t, t, t_prev, schedule=SCHEDULE)
    torch.testing.assert_close(q.mean, mean, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(q.variance.item(), 1 / precision, rtol=1e-10, atol=0)


def test_posterior_of_the_first_step_is_x0_itself() -> None:
    x_0 = _draw(1, 6)
    q = posterior(x_0, _draw(1, 6, seed=1), torch.tensor([0]), torch.tensor([-1]), schedule=SCHEDULE)
    torch.testing.assert_close(q.mean, x_0, rtol=1e-12, atol=1e-12)
    assert q.variance.item() == 0


@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_the_same_error_of_x0_weighs_the_same(weighting: Weighting) -> None:
    """The weighted loss under epsilon, x0 and v is min(SNR, gamma) or min(SNR + 1, gamma) times the error of x_0."""
    t = torch.tensor([10, 300, 800])
    x_0, eps, wrong = _draw(3, 50), _draw(3, 50, seed=1), _draw(3, 50, seed=2)
    x_t = q_sample(x_0, eps, t, schedule=SCHEDULE)
    losses = {}
    for prediction in PREDICTIONS:
        target = training_target(x_0, eps, t, prediction=prediction, schedule=SCHEDULE)
        output = target + 0.1 * wrong
        error = denoised(output, x_t, t, prediction=prediction, schedule=SCHEDULE).x_0 - x_0
        weight = loss_weight(t, schedule=SCHEDULE, prediction=prediction, weighting=weighting, gamma=5.0)
        losses[prediction] = weight * squared_error(output, target) / error.square().mean(1).float()
    snr = SCHEDULE.snr(t).float()
    expected = dict.fromkeys(PREDICTIONS, (snr + (weighting == "snr_plus_one")).clamp(max=5))
    if weighting == "uniform":
        expected = {"epsilon": snr, "x0": torch.ones(3), "v": snr + 1}
    for prediction in PREDICTIONS:
        torch.testing.assert_close(losses[prediction], expected[prediction], rtol=1e-4, atol=0)


def test_squared_error_of_bfloat16_is_computed_in_float32() -> None:
    output = torch.full((2, 4096), 1.0, dtype=torch.bfloat16)
    assert squared_error(output, torch.zeros(2, 4096)).tolist() == [1.0, 1.0]


def test_class_dropout_has_its_rate_and_touches_nothing_else() -> None:
    n, rate = 100_000, 0.1
    label = torch.arange(n) % 7
    uniform = torch.rand(n, generator=torch.Generator().manual_seed(0))
    dropped = drop_labels(label, uniform, null_label=7, rate=rate)
    is_null = dropped == 7
    assert abs(is_null.double().mean().item() - rate) < 5 * (rate * (1 - rate) / n) ** 0.5
    assert torch.equal(dropped[~is_null], label[~is_null])
    assert torch.equal(drop_labels(label, uniform, null_label=7, rate=0.0), label)
    assert bool((drop_labels(label, uniform, null_label=7, rate=1.0) == 7).all())


def test_noise_of_a_seed_is_the_same_in_any_batch() -> None:
    together, alone = NoiseSource([3, 5, 7]), NoiseSource([5])
    for _ in range(2):
        assert torch.equal(together.normal(10, 2)[1], alone.normal(10, 2)[0])
        assert together.uniform()[1] == alone.uniform()[0]
        assert together.integers(1000)[1] == alone.integers(1000)[0]
    first = NoiseSource([3, 5]).normal(1000)
    assert abs(torch.corrcoef(first)[0, 1].item()) < 0.2
