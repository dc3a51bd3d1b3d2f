"""The hybrid loss of Nichol and Dhariwal 2021: what learns from what, and which variance comes of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from shapediff.checkpoint import ExportConfig, read_export, write_export
from shapediff.diffusion.bound import sampled_bits
from shapediff.diffusion.gaussian import PREDICTIONS, Prediction, denoised, q_sample
from shapediff.diffusion.loss import VLB_WEIGHT
from shapediff.diffusion.random import NoiseSource
from shapediff.diffusion.samplers import SAMPLERS
from shapediff.diffusion.schedule import NoiseScheduleConfig
from shapediff.diffusion.variance import log_variance
from shapediff.errors import ConfigError
from shapediff.methods import SampleConfig, VoxelDiffusion, VoxelDiffusionConfig
from shapediff.methods.base import Batch
from shapediff.models import DiT3DConfig, ModelConfig, UNet3DConfig
from tests.methods.linear_denoiser import STD, Lines, fit, gaussian_batch

NUM_CLASSES, RESOLUTION = 2, 8
MODELS: dict[str, ModelConfig] = {
    "unet3d": UNet3DConfig(width=8, width_multipliers=(1, 2), num_res_blocks=1, attention_levels=()),
    "dit3d": DiT3DConfig(hidden_size=12, depth=1, num_heads=2),
}


def _method(variance: str = "learned", **settings: object) -> VoxelDiffusion:
    schedule = NoiseScheduleConfig("cosine", num_timesteps=50)
    config = VoxelDiffusionConfig(schedule=schedule, variance=variance, **settings)  # type: ignore[arg-type]
    return config.build(resolution=RESOLUTION, num_classes=NUM_CLASSES)


def _batch(b: int) -> Batch:
    voxels = torch.randn(b, RESOLUTION**3, generator=torch.Generator().manual_seed(0)).sign()
    return {"voxels": voxels, "label": torch.arange(b) % NUM_CLASSES}


class TwoHeads(nn.Module):
    """The prediction from one weight, the variance from another."""

    def __init__(self, *, learned: bool) -> None:
        super().__init__()
        self.mean, self.fraction = nn.Parameter(torch.tensor(0.3)), nn.Parameter(torch.tensor(0.2))
        self.learned = learned

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        mean = self.mean * x_t
        return torch.cat([mean, self.fraction * x_t.abs()], 1) if self.learned else mean


@pytest.mark.parametrize("weighting", ["uniform", "min_snr", "snr_plus_one"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_mean_learns_from_the_simple_loss_alone(prediction: str, weighting: str) -> None:
    gradients, outputs = [], []
    for learned in (False, True):
        network = TwoHeads(learned=learned)
        method = _method("learned" if learned else "fixed", prediction=prediction, weighting=weighting)
        outputs.append(method.loss({"denoiser": network}, _batch(64), range(64)))
        outputs[-1].loss.backward()
        gradients.append((network.mean.grad, network.fraction.grad))
    assert torch.equal(gradients[0][0], gradients[1][0])  # type: ignore[arg-type]
    assert gradients[0][1] is None and gradients[1][1].abs() > 0  # type: ignore[union-attr]
    assert torch.equal(outputs[0].error, outputs[1].error)
    assert not torch.equal(outputs[0].per_sample, outputs[1].per_sample)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_the_hybrid_loss_is_the_sum_of_both(prediction: Prediction) -> None:
    method, network, batch = _method(prediction=prediction), TwoHeads(learned=True), _batch(64)
    simple = _method("fixed", prediction=prediction).loss({"denoiser": TwoHeads(learned=False)}, batch, range(64))
    hybrid = method.loss({"denoiser": network}, batch, range(64))
    # The same draws again, in their order: t, whether the label is dropped, eps.
    noise = NoiseSource(range(64))
    t, _, eps = noise.integers(50), noise.uniform(), noise.normal(RESOLUTION**3)
    x_t = q_sample(batch["voxels"], eps, t, schedule=method.schedule)
    x_0_hat = denoised(0.3 * x_t, x_t, t, prediction=prediction, schedule=method.schedule).x_0
    fraction = (0.2 * x_t.abs() + 1) / 2
    bits = sampled_bits(batch["voxels"], x_0_hat, fraction, t, schedule=method.schedule)
    assert int(t.min()) == 0  # the decoder is among the terms
    torch.testing.assert_close(hybrid.per_sample, simple.per_sample + VLB_WEIGHT * bits, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(hybrid.loss.detach(), hybrid.per_sample.mean())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_it_learns_the_true_variance_of_gaussian_data(prediction: Prediction) -> None:
    """A line and a fraction a timestep, trained through the loss of the method: the closed form comes out."""
    num_timesteps, n = 6, 300
    schedule = NoiseScheduleConfig("cosine", num_timesteps=num_timesteps, log_snr_shift=-1.0)
    config = VoxelDiffusionConfig(schedule=schedule, prediction=prediction, variance="learned")
    method, network = config.build(resolution=RESOLUTION, num_classes=1), Lines(num_timesteps, learned=True)
    batch = gaussian_batch(n, method)
    # The means first, by themselves, since the variance follows their error; then the variances.
    fit([network.slope, network.offset], network, method, batch)
    fit([network.out], network, method, batch)
    t = torch.arange(1, num_timesteps)
    abar, abar_prev = method.schedule.abar(t), method.schedule.abar(t - 1)
    v, v_prev = (a * STD**2 + 1 - a for a in (abar, abar_prev))
    fraction = (network.out.detach()[1:].double() + 1) / 2
    found = log_variance(fraction, t, t - 1, schedule=method.schedule)
    # A variance from n / T * 512 draws, a fifth fewer for some t: five relative errors sqrt(2 / 20000).
    torch.testing.assert_close(found, torch.log((1 - abar / abar_prev) * v_prev / v), rtol=0, atol=0.05)


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("name", MODELS)
def test_networks_have_twice_the_channels_and_every_sampler_takes_them(name: str, sampler: str) -> None:
    torch.manual_seed(0)
    method = _method(prediction="v")
    networks = method.build_networks(MODELS[name])
    x = torch.randn(2, RESOLUTION**3)
    assert networks["denoiser"](x, torch.tensor([3, 40]), torch.tensor([0, 1])).shape == (2, 2 * RESOLUTION**3)
    for p in networks["denoiser"].parameters():
        nn.init.normal_(p, std=0.05)
    voxels = method.sample(
        networks, torch.tensor([0, 1]), [1, 2], config=SampleConfig(sampler=sampler, num_steps=4, guidance_rescale=0.5)
    )
    assert voxels.shape == (2, RESOLUTION**3) and bool(voxels.isfinite().all())
    output = method.loss(networks, _batch(4), range(4))
    output.loss.backward()
    gradients = [p.grad for p in networks["denoiser"].parameters()]
    assert all(g is not None and bool(g.isfinite().all()) for g in gradients)


@pytest.mark.parametrize("name", MODELS)
def test_channels_come_out_one_signal_after_the_other(name: str) -> None:
    """The first half of the wide network is the narrow network with the same weights."""
    wide, narrow = (MODELS[name].build(resolution=RESOLUTION, num_classes=2, out_channels=c) for c in (2, 1))
    for p in wide.parameters():
        nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(p.numel()))
    state, shapes = wide.state_dict(), {key: value.shape for key, value in narrow.state_dict().items()}
    narrow.load_state_dict({key: value[: shapes[key][0]] if shapes[key] else value for key, value in state.items()})
    inputs = torch.randn(2, RESOLUTION**3), torch.tensor([3, 40]), torch.tensor([0, 1])
    both, first = wide.eval()(*inputs), narrow.eval()(*inputs)
    torch.testing.assert_close(both[:, : RESOLUTION**3], first, rtol=1e-4, atol=1e-5)


def test_zero_terminal_snr_and_an_export_go_with_it(tmp_path: Path) -> None:
    schedule = NoiseScheduleConfig("cosine", num_timesteps=50, zero_terminal_snr=True)
    method = VoxelDiffusionConfig(schedule=schedule, prediction="v", variance="learned")
    config = ExportConfig(8, "occupancy", ("chair",), method, MODELS["unet3d"])
    networks = config.build_method().build_networks(config.model)
    write_export(tmp_path / "a", config, {"denoiser": networks["denoiser"].state_dict()}, dtype=torch.float32)
    read = read_export(tmp_path / "a")
    assert read.config == config
    output = read.method.loss(read.networks, _batch(128), range(128))
    assert bool(output.per_sample.isfinite().all()) and int(output.t.max()) == 49


def test_refuses_what_cannot_be_learned() -> None:
    with pytest.raises(ValueError, match="variance 'large' is unknown"):
        VoxelDiffusionConfig(variance="large")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="variance=learned needs"):
        VoxelDiffusionConfig(schedule=NoiseScheduleConfig(num_timesteps=1), variance="learned")
