"""epsilon, x0 and v are three ways to say the same: one optimum, one weighting in x_0, one way to drop the label."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from shapediff.diffusion.gaussian import PREDICTIONS, Prediction, denoised, training_target
from shapediff.diffusion.schedule import NoiseScheduleConfig
from shapediff.methods import VoxelDiffusion, VoxelDiffusionConfig
from shapediff.methods.base import Batch
from tests.methods.linear_denoiser import MEAN, STD, Lines, fit, gaussian_batch

RESOLUTION, NUM_CLASSES, NUM_TIMESTEPS = 4, 3, 8


def _method(num_timesteps: int = NUM_TIMESTEPS, **settings: object) -> VoxelDiffusion:
    schedule = NoiseScheduleConfig("cosine", num_timesteps=num_timesteps, log_snr_shift=-1.0)
    config = VoxelDiffusionConfig(schedule=schedule, **settings)  # type: ignore[arg-type]
    return config.build(resolution=RESOLUTION, num_classes=NUM_CLASSES)


@pytest.mark.parametrize("weighting", ["uniform", "min_snr"])
def test_every_prediction_comes_to_the_same_best_denoiser(weighting: str) -> None:
    """The x_0_hat of the trained line is that of least squares, alike for all three, and E[x_0 | x_t] up to sampling error."""
    n, found = 400, {}
    x_t = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0], dtype=torch.float64).expand(NUM_TIMESTEPS, -1)
    t = torch.arange(NUM_TIMESTEPS)
    for prediction in PREDICTIONS:
        method, network = _method(prediction=prediction, weighting=weighting), Lines(NUM_TIMESTEPS)
        fit([network.slope, network.offset], network, method, gaussian_batch(n, method))
        line = (network.slope[:, None] * x_t + network.offset[:, None]).detach()
        found[prediction] = denoised(line, x_t, t, prediction=prediction, schedule=method.schedule).x_0  # type: ignore[arg-type]
    abar = method.schedule.abar(t)[:, None]
    variance = abar * STD**2 + 1 - abar
    best = MEAN + abar.sqrt() * STD**2 / variance * (x_t - abar.sqrt() * MEAN)
    # Least squares on n / T * 64 points: the standard error of a line at x_t, five times.
    num_points = n / NUM_TIMESTEPS * RESOLUTION**3
    rest = STD**2 * (1 - abar) / variance
    error = (rest / num_points * (1 + (x_t - abar.sqrt() * MEAN).square() / variance)).sqrt()
    for prediction in PREDICTIONS:
        # The number of samples of each t varies by a tenth or more.
        assert bool(((found[prediction] - best).abs() < 1.3 * 5 * error).all())
    # Among each other only float32 differs, but at the last t: there min_snr weighs next to nothing, and the descent is slow.
    torch.testing.assert_close(found["x0"][:-1], found["v"][:-1], rtol=0, atol=1e-4)
    torch.testing.assert_close(found["epsilon"][:-1], found["v"][:-1], rtol=0, atol=1e-3)


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_is_one_loss_in_x0_whatever_is_predicted(gamma: float) -> None:
    """One x_0_hat said in three ways: the loss of each sample is min(SNR, gamma) (x_0 - x_0_hat)^2 (Hang et al. 2023)."""
    batch = gaussian_batch(200, _method())
    x_0_hat = 0.4 * torch.ones(1, RESOLUTION**3)
    for prediction in PREDICTIONS:
        method = _method(100, prediction=prediction, weighting="min_snr", min_snr_gamma=gamma)

        class Says(nn.Module):
            def forward(self, x_t: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
                said, schedule = x_0_hat.expand_as(x_t).double(), method.schedule  # noqa: B023
                abar = schedule.abar(t)[:, None]
                eps = (x_t - abar.sqrt() * said) / (1 - abar).sqrt()
                return training_target(said, eps, t, prediction=prediction, schedule=schedule)  # type: ignore[arg-type] # noqa: B023

        output = method.loss({"denoiser": Says()}, batch, range(200))
        error = (batch["voxels"] - x_0_hat).square().mean(1)
        expected = method.schedule.snr(output.t).clamp(max=gamma).float() * error
        # Errors of eps at t = 0 are differences of numbers of size 1, 1e-2 themselves: float32 leaves three digits.
        torch.testing.assert_close(output.per_sample, expected, rtol=2e-3, atol=1e-6)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_min_snr_weights_as_published(prediction: Prediction) -> None:
    """min(gamma / SNR, 1) on eps, min(SNR, gamma) on x_0, min(SNR, gamma) / (SNR + 1) on v (Hang et al. 2023, sec. 3.4)."""
    method = _method(100, prediction=prediction, weighting="min_snr", min_snr_gamma=5.0)

    class Zero(nn.Module):
        def forward(self, x_t: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            return torch.zeros_like(x_t)

    output = method.loss({"denoiser": Zero()}, gaussian_batch(200, method), range(200))
    snr = method.schedule.snr(output.t)
    published = {"epsilon": (5 / snr).clamp(max=1), "x0": snr.clamp(max=5), "v": snr.clamp(max=5) / (snr + 1)}
    torch.testing.assert_close(output.per_sample, published[prediction].float() * output.error, rtol=1e-6, atol=0)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0])
def test_the_null_label_comes_at_its_rate_whatever_class_timestep_and_noise(rate: float) -> None:
    n = 6000

    class Recorder(nn.Module):
        def forward(self, x_t: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            self.label, self.noise = label, x_t.mean(1)
            return torch.zeros_like(x_t)

    network, label = Recorder(), torch.arange(n) % NUM_CLASSES
    batch: Batch = {"voxels": torch.zeros(n, RESOLUTION**3), "label": label}
    output = _method(class_dropout=rate).loss({"denoiser": network}, batch, range(n))
    is_null = network.label == NUM_CLASSES
    assert torch.equal(network.label[~is_null], label[~is_null])
    assert torch.equal(output.label, label)
    spread = math.sqrt(rate * (1 - rate))
    groups = [label == k for k in range(NUM_CLASSES)] + [output.t == s for s in range(NUM_TIMESTEPS)]
    for group in [torch.ones(n, dtype=torch.bool), network.noise > 0, *groups]:
        # Five standard errors of a share, in each of thirteen groups.
        assert abs(is_null[group].double().mean().item() - rate) <= 5 * spread / math.sqrt(int(group.sum()))
