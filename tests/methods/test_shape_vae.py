"""ShapeVAE: KL and the draw of latents against closed forms, what the KL weight does, shapes that come back."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.distributions import Normal
from torch.distributions import kl_divergence as expected_kl

from shapediff.checkpoint import ExportConfig, write_export
from shapediff.diffusion.editing import Edit
from shapediff.errors import ConfigError
from shapediff.grid.morton import morton_decode, morton_encode
from shapediff.methods import SampleConfig, ShapeVAE, ShapeVAEConfig
from shapediff.methods.base import Batch
from shapediff.methods.shape_vae import kl_divergence, reconstruction_error, signal_of
from shapediff.models import UNet3DConfig, VAE3DConfig
from shapediff.models.vae3d import VAE3D, Gaussian
from shapediff.pipeline import ShapePipeline

RESOLUTION, NUM_CLASSES = 8, 2
TINY = VAE3DConfig(width=16, width_multipliers=(1, 1), num_res_blocks=1)


def vae_of(**settings: float) -> tuple[ShapeVAE, VAE3D]:
    torch.manual_seed(0)
    method = ShapeVAEConfig(**settings).build(resolution=RESOLUTION, num_classes=NUM_CLASSES)
    network = method.build_networks(TINY)["vae"]
    assert isinstance(network, VAE3D)
    return method, network


def batch_of(num: int) -> Batch:
    """Boxes of all sizes, as occupancy, in no order that matters here."""
    generator = torch.Generator().manual_seed(3)
    coarse = torch.rand(num, RESOLUTION**3 // 64, generator=generator) < 0.5
    return {"voxels": coarse.repeat_interleave(64, 1).float() * 2 - 1, "label": torch.arange(num) % NUM_CLASSES}


def train(method: ShapeVAE, network: VAE3D, batch: Batch, *, steps: int) -> None:
    """Adam on one batch."""
    optimizer = torch.optim.Adam(network.parameters(), lr=3e-3)
    for step in range(steps):
        loss = method.loss({"vae": network}, batch, range(step, step + len(batch["label"]))).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def random_gaussian(seed: int, *shape: int) -> Gaussian:
    generator = torch.Generator().manual_seed(seed)
    return Gaussian(*(torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2)))


def test_kl_is_that_of_normal_distributions() -> None:
    q, p = random_gaussian(0, 3, 5), random_gaussian(1, 3, 5)
    a, b = (Normal(g.mean, (g.log_variance / 2).exp()) for g in (q, p))
    torch.testing.assert_close(kl_divergence(q, p), expected_kl(a, b).sum(1))
    assert float(kl_divergence(q, q).abs().max()) < 1e-12


def test_gradients_reach_mean_and_variance_through_a_draw() -> None:
    """E[z^2] = mu^2 + sigma^2: its gradients are 2 mu in mu and sigma^2 in log sigma^2."""
    mean, log_variance = torch.tensor([[0.7]]).requires_grad_(), torch.tensor([[-0.8]]).requires_grad_()
    eps = torch.randn(40000, 1, generator=torch.Generator().manual_seed(0))
    eps = (eps - eps.mean()) / eps.std(correction=0)  # so that the sample has the moments of the distribution
    Gaussian(mean, log_variance).draw(eps).square().mean().backward()
    assert float(mean.grad) == pytest.approx(1.4, rel=1e-4)  # type: ignore[arg-type]
    assert float(log_variance.grad) == pytest.approx(math.exp(-0.8), rel=1e-4)  # type: ignore[arg-type]


def test_reconstruction_of_occupancy_is_cross_entropy_and_dice() -> None:
    x = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    perfect = reconstruction_error(50 * x, x)
    assert float(perfect) == pytest.approx(0, abs=1e-6)
    # Probability 1/2 everywhere: log 2, and 1 - (2 * 1 + 1) / (2 + 2 + 1).
    assert float(reconstruction_error(0 * x, x)) == pytest.approx(math.log(2) + 1 - 3 / 5)
    assert float(reconstruction_error(-50 * x, x)) == pytest.approx(50 + 1 - 1 / 5)


def test_reconstruction_of_a_tsdf_counts_the_band_as_much_as_the_rest() -> None:
    x = torch.full((1, 1000), -1.0)
    x[0, :4] = torch.tensor([-0.5, 0.0, 0.5, 0.9])
    logits = 2 * torch.atanh(x.clamp(-1 + 1e-7, 1 - 1e-7))
    torch.testing.assert_close(signal_of(logits), x, rtol=0, atol=1e-6)
    assert float(reconstruction_error(logits, x)) == pytest.approx(0, abs=1e-6)
    moved = 2 * torch.atanh((x + 0.1).clamp(-1 + 1e-7, 0.9999999))
    moved[0, 3] = logits[0, 3]
    # 0.1 at three of four voxels of the band, 0.1 at all of the others: where e^2 / 2b meets |e| - b / 2.
    assert float(reconstruction_error(moved, x)) == pytest.approx(0.0375 + 0.05, abs=1e-4)


@pytest.mark.parametrize(("error", "expected"), [(0.02, 0.02**2 / 0.2), (0.05, 0.0125), (0.3, 0.25), (1.0, 0.95)])
def test_small_errors_of_distance_count_squared_and_large_ones_once(error: float, expected: float) -> None:
    x = torch.full((1, 8), -0.5)  # all in the band
    assert float(reconstruction_error(2 * torch.atanh(x + error), x)) == pytest.approx(expected, abs=1e-6)


def test_the_loss_is_the_sum_of_both() -> None:
    method, network = vae_of(kl_weight=0.3, class_dropout=0.0)
    torch.nn.init.normal_(network.prior)
    batch = batch_of(4)
    found = method.loss({"vae": network}, batch, range(4))
    kl = kl_divergence(network.encode(batch["voxels"]), network.prior_of(batch["label"])) / RESOLUTION**3
    torch.testing.assert_close(found.per_sample, found.error + 0.3 * kl.detach())
    torch.testing.assert_close(found.loss.detach(), found.per_sample.mean())
    torch.testing.assert_close(found.metrics["kl"], kl.detach() * RESOLUTION**3)


def test_weight_zero_is_an_autoencoder_and_shapes_come_back() -> None:
    method, network = vae_of(kl_weight=0.0)
    batch = batch_of(8)
    train(method, network, batch, steps=150)
    assert network.prior.grad is None or not network.prior.grad.any()
    with torch.no_grad():
        again = signal_of(network.decode(network.encode(batch["voxels"]).mean)) > 0
    inside = batch["voxels"] > 0
    assert float((again & inside).sum() / (again | inside).sum()) > 0.97


def test_with_a_large_weight_the_posterior_is_the_prior() -> None:
    method, network = vae_of(kl_weight=1e4, class_dropout=0.0)
    batch = batch_of(8)
    with torch.no_grad():
        before = kl_divergence(network.encode(batch["voxels"]), network.prior_of(batch["label"]))
    train(method, network, batch, steps=150)
    with torch.no_grad():
        posterior, prior = network.encode(batch["voxels"]), network.prior_of(batch["label"])
    assert float(kl_divergence(posterior, prior).mean()) < 0.02 * float(before.mean())
    assert float(posterior.mean.std(0).mean()) < 0.02  # shapes have become one


def test_what_a_class_looks_like_is_learnt_by_its_prior() -> None:
    """Of latents alone, without a decoder: the best p(z | y) has the moments of the posteriors of its class."""
    _, network = vae_of()
    batch = batch_of(8)
    with torch.no_grad():
        posterior = network.encode(batch["voxels"])
    optimizer = torch.optim.LBFGS([network.prior], max_iter=200)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = kl_divergence(posterior, network.prior_of(batch["label"])).mean()
        loss.backward()
        return loss

    optimizer.step(closure)  # type: ignore[arg-type]
    of_class = batch["label"] == 1
    mean = posterior.mean[of_class].mean(0)
    variance = (posterior.log_variance.exp()[of_class] + (posterior.mean[of_class] - mean).square()).mean(0)
    found = network.prior_of(torch.tensor([1]))
    torch.testing.assert_close(found.mean[0], mean, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(found.log_variance[0].exp(), variance, rtol=1e-2, atol=1e-3)


@torch.no_grad()
def test_latents_are_a_grid_in_morton_order_with_channels_last() -> None:
    """What changes with a block of voxels lies around its latent cell, and with a latent cell around its block."""
    torch.manual_seed(0)
    resolution, cells = 32, 512
    network = ShapeVAEConfig().build(resolution=resolution, num_classes=1).build_networks(TINY)["vae"]
    assert isinstance(network, VAE3D)
    where = torch.from_numpy(morton_decode(np.arange(cells)).astype(np.float32))
    x, z = torch.randn(1, resolution**3), torch.randn(1, cells * 8)
    for place in ([2, 3, 5], [4, 2, 3], [5, 5, 2]):
        cell = int(morton_encode(np.array(place)))
        moved_x, moved_z = x.clone(), z.clone()
        moved_x.view(cells, -1)[cell] += 0.1
        moved_z.view(cells, -1)[cell] += 0.1
        by_voxels = (network.encode(moved_x).mean - network.encode(x).mean).view(cells, -1)
        by_latents = (network.decode(moved_z) - network.decode(z)).view(cells, -1)
        for change in (by_voxels, by_latents):
            share = change.square().sum(1) / change.square().sum()
            torch.testing.assert_close(share @ where, torch.tensor(place, dtype=torch.float32), rtol=0, atol=0.6)


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, ShapeVAE, VAE3D]:
    method, network = vae_of()
    torch.nn.init.normal_(network.prior, std=0.5)
    config = ExportConfig(RESOLUTION, "occupancy", ("ball", "bar"), method.config, TINY)
    write_export(tmp_path / "export", config, {"vae": network.state_dict()}, dtype=torch.float32)
    return tmp_path / "export", method, network


def test_samples_are_draws_of_the_prior_of_their_class(checkpoint: tuple[Path, ShapeVAE, VAE3D]) -> None:
    path, method, network = checkpoint
    pipeline = ShapePipeline.from_pretrained(path)
    shapes = pipeline(3, label="bar", seed=4, precision="float32")
    assert shapes.voxels.shape == (3, RESOLUTION, RESOLUTION, RESOLUTION)
    torch.testing.assert_close(shapes.voxels, pipeline(3, label="bar", seed=4, precision="float32").voxels)
    assert float((shapes.voxels - pipeline(3, label="ball", seed=4, precision="float32").voxels).abs().max()) > 1e-4
    prior = network.prior_of(torch.tensor([1]))
    given = Edit(x_T=prior.mean)
    drawn = method.sample({"vae": network}, torch.tensor([1]), [0], config=SampleConfig(), edit=given)
    torch.testing.assert_close(drawn, signal_of(network.decode(prior.mean)))


def test_an_interpolation_goes_from_shape_to_shape(checkpoint: tuple[Path, ShapeVAE, VAE3D]) -> None:
    path, _, _ = checkpoint
    pipeline = ShapePipeline.from_pretrained(path)
    a, b = pipeline(2, label="ball").voxels
    between = pipeline.interpolate(a, b, 3).voxels
    assert torch.equal(between[0], a) and torch.equal(between[2], b)
    assert float((between[1] - a).abs().max()) > 1e-4


def test_what_it_cannot_do_is_said(checkpoint: tuple[Path, ShapeVAE, VAE3D]) -> None:
    path, method, _ = checkpoint
    pipeline = ShapePipeline.from_pretrained(path)
    grid = torch.ones(RESOLUTION, RESOLUTION, RESOLUTION)
    with pytest.raises(ConfigError, match="can interpolate, but not"):
        pipeline.vary(grid, 0.5)
    with pytest.raises(ConfigError, match="can interpolate, but not"):
        pipeline(1, mirror="x")
    with pytest.raises(ConfigError, match="trains model=vae3d"):
        method.build_networks(UNet3DConfig())
    with pytest.raises(ValueError, match="latent_channels=4"):
        VAE3DConfig(latent_channels=4)
    with pytest.raises(ValueError, match="not divisible"):
        VAE3DConfig(width_multipliers=(1, 1, 1)).build(resolution=4, num_classes=1)
