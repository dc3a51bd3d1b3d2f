"""Voxel diffusion: its loss is the textbook's, its randomness is each sample's own, and it learns what can be learnt."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shapediff.diffusion.bound import variational_bound
from shapediff.diffusion.gaussian import PREDICTIONS
from shapediff.diffusion.random import NoiseSource
from shapediff.diffusion.samplers import SAMPLERS, Process, timestep_array
from shapediff.diffusion.schedule import NoiseScheduleConfig
from shapediff.errors import ConfigError
from shapediff.methods import SampleConfig, VoxelDiffusion, VoxelDiffusionConfig
from shapediff.methods.base import Batch
from shapediff.methods.voxel_diffusion import BOUND_DRAWS

NUM_CLASSES, RESOLUTION = 2, 4


class Recorder(nn.Module):
    """Outputs zero and remembers what it was given."""

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        self.x_t, self.t, self.label = x_t, t, label
        return torch.zeros_like(x_t)


def _method(**settings: object) -> VoxelDiffusion:
    config = VoxelDiffusionConfig(schedule=NoiseScheduleConfig("cosine", num_timesteps=100), **settings)  # type: ignore[arg-type]
    return config.build(resolution=RESOLUTION, num_classes=NUM_CLASSES)


def _batch(b: int) -> Batch:
    voxels = torch.randn(b, RESOLUTION**3, generator=torch.Generator().manual_seed(0)).sign()
    return {"voxels": voxels, "label": torch.arange(b) % NUM_CLASSES}


def test_loss_of_saying_zero_is_the_power_of_the_noise() -> None:
    output = _method().loss({"denoiser": Recorder()}, _batch(256), range(256))
    # mean of eps^2 over n = 256 * 64 draws: 1 within five standard errors sqrt(2 / n).
    assert abs(output.loss.item() - 1) < 5 * (2 / (256 * 64)) ** 0.5
    torch.testing.assert_close(output.loss, output.per_sample.mean())
    torch.testing.assert_close(output.per_sample, output.error)


def test_timesteps_cover_the_range_and_labels_are_dropped_at_the_rate() -> None:
    network, n = Recorder(), 4000
    _method().loss({"denoiser": network}, _batch(n), range(n))
    counts = torch.bincount(network.t, minlength=100).double()
    assert len(counts) == 100
    # chi-square with 99 degrees of freedom: 200 is beyond 7 standard deviations.
    assert ((counts - n / 100).square() / (n / 100)).sum() < 200
    is_null = network.label == NUM_CLASSES
    assert abs(is_null.double().mean().item() - 0.1) < 5 * (0.09 / n) ** 0.5
    assert torch.equal(network.label[~is_null], (torch.arange(n) % NUM_CLASSES)[~is_null])


def test_a_sample_sees_the_same_noise_in_any_batch() -> None:
    method, network, batch = _method(), Recorder(), _batch(4)
    whole = method.loss({"denoiser": network}, batch, [10, 11, 12, 13])
    x_t = network.x_t
    half: Batch = {"voxels": batch["voxels"][2:], "label": batch["label"][2:]}
    part = method.loss({"denoiser": network}, half, [12, 13])
    assert torch.equal(network.x_t, x_t[2:])
    assert torch.equal(part.per_sample, whole.per_sample[2:]) and torch.equal(part.t, whole.t[2:])


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_every_prediction_learns_the_same_two_shapes(prediction: str) -> None:
    """One shape a class: the model must give back exactly the shape of the class it is asked for."""

    class Table(nn.Module):
        """x_0 by class from a table, through the algebra of each prediction: the optimum is reachable."""

        def __init__(self) -> None:
            super().__init__()
            self.x_0 = nn.Parameter(torch.zeros(NUM_CLASSES + 1, RESOLUTION**3))

        def forward(self, x_t: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            abar = method.schedule.abar(t).float()[:, None]
            x_0 = self.x_0[label]
            eps = (x_t - abar.sqrt() * x_0) / (1 - abar).sqrt()
            return {"epsilon": eps, "x0": x_0, "v": abar.sqrt() * eps - (1 - abar).sqrt() * x_0}[prediction]

    method = _method(prediction=prediction, weighting="min_snr")
    shapes = torch.randn(2, RESOLUTION**3, generator=torch.Generator().manual_seed(3)).sign()
    network = Table()
    optimizer = torch.optim.Adam(network.parameters(), lr=0.1)
    for step in range(100):
        batch: Batch = {"voxels": shapes.repeat(8, 1), "label": torch.arange(16) % 2}
        optimizer.zero_grad()
        method.loss({"denoiser": network}, batch, range(16 * step, 16 * step + 16)).loss.backward()
        optimizer.step()
    torch.testing.assert_close(network.x_0[:2].detach(), shapes, rtol=0, atol=0.05)
    with torch.no_grad():
        out = method.sample(
            {"denoiser": network}, torch.tensor([0, 1]), [0, 1], config=SampleConfig(num_steps=10, guidance_scale=1.0)
        )
    assert torch.equal(out.sign(), shapes)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_depend_on_their_seed_and_label_alone(sampler: str) -> None:
    method = _method(prediction="v")
    torch.manual_seed(0)
    linear = nn.Linear(RESOLUTION**3, RESOLUTION**3)

    class Network(nn.Module):
        def forward(self, x_t: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
            return torch.tanh(linear(x_t) + 0.1 * label[:, None])

    config = SampleConfig(sampler=sampler, num_steps=5, guidance_scale=2.0)
    networks = {"denoiser": Network()}
    with torch.no_grad():
        together = method.sample(networks, torch.tensor([0, 1, 1]), [7, 8, 9], config=config)
        alone = method.sample(networks, torch.tensor([1]), [8], config=config)
        other_label = method.sample(networks, torch.tensor([0]), [8], config=config)
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=1e-5)
    assert not torch.allclose(alone, other_label, atol=1e-3)
    assert not torch.allclose(together[1], together[2], atol=1e-3)
    assert together.abs().max() <= 1


class _Labelled(nn.Module):
    """Outputs by the label, timestep and place; counts its forwards."""

    def __init__(self) -> None:
        super().__init__()
        self.num_samples: list[int] = []

    def forward(self, x_t: torch.Tensor, t: torch.Tensor, label: torch.Tensor) -> torch.Tensor:
        self.num_samples.append(len(x_t))
        place = torch.linspace(-1, 1, x_t.shape[1])
        return 0.1 * x_t + 0.3 * torch.sin(5 * place + label[:, None]) - t[:, None] / 1000


def test_settings_of_guidance_reach_the_denoiser() -> None:
    method = _method(prediction="v")

    def sample(**settings: object) -> tuple[torch.Tensor, list[int]]:
        network = _Labelled()
        config = SampleConfig(num_steps=10, guidance_scale=3.0, **settings)  # type: ignore[arg-type]
        return method.sample({"denoiser": network}, torch.tensor([0, 1]), [7, 8], config=config), network.num_samples

    plain, calls = sample()
    assert calls == [4] * 10
    split, calls = sample(split_batch=True)
    assert calls == [2] * 20
    torch.testing.assert_close(split, plain, rtol=0, atol=1e-6)
    limited, calls = sample(guidance_interval=(0.3, 0.9))
    assert set(calls) == {2, 4} and calls[0] == calls[-1] == 2
    assert not torch.allclose(limited, plain, atol=1e-3)
    rescaled, calls = sample(guidance_rescale=1.0)
    assert calls == [4] * 10 and not torch.allclose(rescaled, plain, atol=1e-3)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_trains_and_samples_from_pure_noise(sampler: str) -> None:
    schedule = NoiseScheduleConfig("cosine", num_timesteps=100, zero_terminal_snr=True)
    method = VoxelDiffusionConfig(schedule=schedule, prediction="v").build(
        resolution=RESOLUTION, num_classes=NUM_CLASSES
    )
    output = method.loss({"denoiser": Recorder()}, _batch(512), range(512))
    assert bool(output.per_sample.isfinite().all()) and int(output.t.max()) == 99
    config = SampleConfig(sampler=sampler, num_steps=5)
    voxels = method.sample({"denoiser": _Labelled()}, torch.tensor([0, 1]), [7, 8], config=config)
    assert bool(voxels.isfinite().all())


def test_refuses_what_pure_noise_cannot_teach() -> None:
    schedule = NoiseScheduleConfig("cosine", zero_terminal_snr=True)
    with pytest.raises(ConfigError, match="prediction=epsilon does not go with"):
        VoxelDiffusionConfig(schedule=schedule)
    with pytest.raises(ConfigError, match="weighting=min_snr does not go with"):
        VoxelDiffusionConfig(schedule=schedule, prediction="v", weighting="min_snr")
    VoxelDiffusionConfig(schedule=schedule, prediction="x0")


def test_refuses_settings_that_cannot_work() -> None:
    for settings in ({"prediction": "score"}, {"weighting": "p2"}, {"class_dropout": 1.5}, {"min_snr_gamma": 0.0}):
        with pytest.raises(ValueError, match=next(iter(settings))):
            VoxelDiffusionConfig(**settings)  # type: ignore[arg-type]
    for settings in (
        {"sampler": "euler"},
        {"num_steps": 0},
        {"guidance_scale": -1.0},
        {"guidance_interval": (0.9, 0.1)},
        {"guidance_rescale": 2.0},
        {"spacing": "even"},
        {"eta": 1.5},
        {"eta": 0.5, "sampler": "heun"},
    ):
        with pytest.raises(ValueError, match=next(iter(settings))):
            SampleConfig(**settings)  # type: ignore[arg-type]


def test_bits_of_a_shape_are_the_bound_of_the_whole_chain() -> None:
    """With as many draws as timesteps each is visited once, and a denoiser that says 0 of any noise leaves no chance."""
    schedule = NoiseScheduleConfig("cosine", num_timesteps=BOUND_DRAWS)
    method = VoxelDiffusionConfig(schedule=schedule, prediction="x0").build(resolution=4, num_classes=2)
    batch = _batch(3)
    found = method.bits_per_voxel({"denoiser": Recorder()}, batch["voxels"], batch["label"], range(3))
    process = Process(schedule.build(), "x0")
    steps = timestep_array(BOUND_DRAWS, BOUND_DRAWS)
    bound = variational_bound(
        lambda x_t, t: 0 * x_t, batch["voxels"], steps, process=process, noise=NoiseSource(range(3))
    )
    torch.testing.assert_close(found, bound.total)


def test_random_timesteps_leave_the_bound_where_it_is() -> None:
    """Of 100 timesteps 8 are visited: right on average, whatever the part of the chain a term belongs to."""
    method, n = _method(prediction="x0"), 4000
    voxels = torch.ones(n, RESOLUTION**3)
    found = method.bits_per_voxel({"denoiser": Recorder()}, voxels, torch.zeros(n, dtype=torch.long), range(n))
    bound = variational_bound(
        lambda x_t, t: 0 * x_t,
        voxels[:1],
        timestep_array(100, 100),
        process=Process(method.schedule, "x0"),
        noise=NoiseSource([0]),
    )
    assert abs(float(found.mean() - bound.total)) < 5 * float(found.std()) / n**0.5
