"""Noise schedules against the formulas they come from."""

from __future__ import annotations

import math

import pytest
import torch

from shapediff.diffusion.schedule import NoiseSchedule, NoiseScheduleConfig


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


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("num_timesteps", [1, 10, 137, 1000, 4000])
def test_any_number_of_timesteps_gives_a_falling_table(name: str, num_timesteps: int) -> None:
    table = NoiseScheduleConfig(name, num_timesteps=num_timesteps).build().alphas_cumprod
    assert table.shape == (num_timesteps,)
    assert bool((table > 0).all()) and bool((table < 1).all()) and bool((table.diff() < 0).all())


def test_another_number_of_timesteps_ends_at_about_the_same_noise() -> None:
    ends = [
        math.log(NoiseScheduleConfig("linear", num_timesteps=n).build().alphas_cumprod[-1]) for n in (250, 1000, 4000)
    ]
    # log(1 - beta) = -beta - beta^2/2 - ...: the second term sums to 0.27 at T = 250, to 0.02 at T = 4000.
    assert max(ends) - min(ends) < 0.28


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
    with pytest.raises(ValueError, match="fall"):
        NoiseSchedule(torch.tensor([0.5, 0.6], dtype=torch.float64))
    with pytest.raises(ValueError, match="float64"):
        NoiseSchedule(torch.tensor([0.6, 0.5]))
