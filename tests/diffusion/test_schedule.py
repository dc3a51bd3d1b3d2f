"""Noise schedules against the formulas they come from."""

from __future__ import annotations

import math

import pytest
import torch

from shapediff.diffusion.schedule import NoiseSchedule, NoiseScheduleConfig

NAMES = ("linear", "scaled_linear", "cosine", "sigmoid")


def test_linear_is_the_published_product() -> None:
    abar, expected = 1.0, []
    for t in range(1000):
        abar *= 1 - (1e-4 + (0.02 - 1e-4) * t / 999)
        expected.append(abar)
    table = NoiseScheduleConfig("linear").build().alphas_cumprod
    # float64, 1000 factors: relative rounding error below 1000 * 2^-53.
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float64), rtol=2e-13, atol=0)


def test_cosine_is_the_published_curve() -> None:
    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    table = NoiseScheduleConfig("cosine").build().alphas_cumprod
    expected = torch.tensor([f((t + 1) / 1000) / f(0) for t in range(999)], dtype=torch.float64)
    torch.testing.assert_close(table[:-1], expected, rtol=1e-9, atol=0)
    # The last beta alone is cut to 0.999.
    assert math.isclose(float(table[-1] / table[-2]), 0.001, rel_tol=1e-9)


def test_scaled_linear_is_the_published_product() -> None:
    """The square of a line from sqrt(0.00085) to sqrt(0.012), as in latent diffusion."""
    abar, expected = 1.0, []
    for t in range(1000):
        abar *= 1 - (0.00085**0.5 + (0.012**0.5 - 0.00085**0.5) * t / 999) ** 2
        expected.append(abar)
    table = NoiseScheduleConfig("scaled_linear").build().alphas_cumprod
    # As above: 1000 factors.
    torch.testing.assert_close(table, torch.tensor(expected, dtype=torch.float64), rtol=2e-13, atol=0)
    assert math.isclose(float(table[-1]), 0.0047, rel_tol=0.02)


def test_sigmoid_is_the_published_curve() -> None:
    def sigmoid(x: float) -> float:
        return 1 / (1 + math.exp(-x))

    table = NoiseScheduleConfig("sigmoid").build().alphas_cumprod
    # Chen 2023, algorithm 1, at u = (t + 1) / T: (sigmoid(end) - sigmoid(start + u (end - start))) / (... at u = 0).
    curve = [(sigmoid(3) - sigmoid(-3 + 6 * (t + 1) / 1000)) / (sigmoid(3) - sigmoid(-3)) for t in range(999)]
    # The curve is a difference that falls to 4e-5: up to five of sixteen digits go.
    torch.testing.assert_close(table[:-1], torch.tensor(curve, dtype=torch.float64), rtol=1e-10, atol=0)
    assert math.isclose(float(table[-1] / table[-2]), 0.001, rel_tol=1e-9)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shift", [0.0, -3.0, 1.0])
@pytest.mark.parametrize("num_timesteps", [1, 2, 10, 137, 1000, 4000])
def test_any_number_of_timesteps_gives_a_falling_table(name: str, num_timesteps: int, shift: float) -> None:
    table = NoiseScheduleConfig(name, num_timesteps=num_timesteps, log_snr_shift=shift).build().alphas_cumprod
    assert table.shape == (num_timesteps,) and table.dtype == torch.float64
    assert bool((table > 0).all()) and bool((table < 1).all()) and bool((table.diff() < 0).all())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("shift", [0.0, -3.0])
@pytest.mark.parametrize("num_timesteps", [2, 137, 1000])
def test_zero_terminal_snr_ends_in_pure_noise_and_keeps_the_first(name: str, num_timesteps: int, shift: float) -> None:
    plain = NoiseScheduleConfig(name, num_timesteps=num_timesteps, log_snr_shift=shift).build()
    schedule = NoiseScheduleConfig(
        name, num_timesteps=num_timesteps, log_snr_shift=shift, zero_terminal_snr=True
    ).build()
    table = schedule.alphas_cumprod
    assert float(table[-1]) == 0 and schedule.ends_in_pure_noise and not plain.ends_in_pure_noise
    # A subtraction, a product and a square: a few units in the last place.
    assert math.isclose(float(table[0]), float(plain.alphas_cumprod[0]), rel_tol=1e-14)
    assert bool((table >= 0).all()) and bool((table < 1).all()) and bool((table.diff() < 0).all())
    # Lin et al. 2024, algorithm 1: sqrt(abar) is moved and stretched, so second differences keep their ratio.
    before, after = plain.alphas_cumprod.sqrt(), table.sqrt()
    stretch = float(before[0] / (before[0] - before[-1]))
    torch.testing.assert_close(after.diff(), stretch * before.diff(), rtol=1e-9, atol=1e-15)


def test_pure_noise_has_no_signal_and_infinite_sigma() -> None:
    schedule, last = NoiseScheduleConfig("linear", zero_terminal_snr=True).build(), torch.tensor([999, -1])
    assert schedule.snr(last).tolist() == [0, math.inf]
    assert schedule.sigma(last).tolist() == [math.inf, 0]
    assert schedule.noise_level(last).tolist() == [1, 0]
    assert float(schedule.betas[-1]) == 1


def test_sigma_and_noise_level_tell_the_same() -> None:
    t = torch.arange(1000)
    for name in NAMES:
        schedule = NoiseScheduleConfig(name).build()
        sigma = schedule.sigma(t)
        torch.testing.assert_close(sigma / (1 + sigma.square()).sqrt(), schedule.noise_level(t), rtol=1e-9, atol=0)


@pytest.mark.parametrize(("name", "spread"), [("linear", 0.28), ("scaled_linear", 0.1)])
def test_another_number_of_timesteps_ends_at_about_the_same_noise(name: str, spread: float) -> None:
    ends = [math.log(NoiseScheduleConfig(name, num_timesteps=n).build().alphas_cumprod[-1]) for n in (250, 1000, 4000)]
    # log(1 - beta) = -beta - beta^2/2 - ...: for linear the second term sums to 0.27 at T = 250, to 0.02 at T = 4000.
    assert max(ends) - min(ends) < spread


def test_shift_adds_to_the_log_snr() -> None:
    t = torch.arange(1000)
    plain = NoiseScheduleConfig("cosine").build()
    shifted = NoiseScheduleConfig("cosine", log_snr_shift=-2.0).build()
    torch.testing.assert_close(shifted.snr(t).log(), plain.snr(t).log() - 2, rtol=1e-9, atol=1e-9)


def test_clean_data_stands_at_minus_one_and_betas_rebuild_the_table() -> None:
    schedule = NoiseScheduleConfig("cosine").build()
    assert schedule.abar(torch.tensor([-1, 0])).tolist() == [1.0, float(schedule.alphas_cumprod[0])]
    torch.testing.assert_close(torch.cumprod(1 - schedule.betas, 0), schedule.alphas_cumprod, rtol=1e-9, atol=0)


def test_refuses_what_cannot_be_a_schedule() -> None:
    with pytest.raises(ValueError, match="unknown"):
        NoiseScheduleConfig("quadratic")
    with pytest.raises(ValueError, match="num_timesteps"):
        NoiseScheduleConfig(num_timesteps=0)
    with pytest.raises(ValueError, match="beta_start"):
        NoiseScheduleConfig(beta_start=0.1, beta_end=0.01)
    with pytest.raises(ValueError, match="beta_start"):
        NoiseScheduleConfig("scaled_linear", beta_start=0.02)
    with pytest.raises(ValueError, match="zero_terminal_snr"):
        NoiseScheduleConfig(num_timesteps=1, zero_terminal_snr=True)
    with pytest.raises(ValueError, match="fall"):
        NoiseSchedule(torch.tensor([0.5, 0.6], dtype=torch.float64))
    with pytest.raises(ValueError, match="float64"):
        NoiseSchedule(torch.tensor([0.6, 0.5]))
