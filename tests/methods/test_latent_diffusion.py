"""Latent diffusion: what it diffuses, what its export holds, and edits that are exact in voxels."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shapediff.checkpoint import ExportConfig, read_export, write_export
from shapediff.diffusion.editing import Edit
from shapediff.diffusion.random import NoiseSource
from shapediff.errors import ConfigError
from shapediff.grid.morton import dense_to_morton
from shapediff.methods import LatentDiffusion, LatentDiffusionConfig, SampleConfig, ShapeVAEConfig, VoxelDiffusion
from shapediff.methods.shape_vae import signal_of
from shapediff.models import OctreeTransformerConfig, UNet3DConfig, VAE3DConfig
from shapediff.pipeline import ShapePipeline
from tests.methods.test_shape_vae import RESOLUTION, batch_of

AUTOENCODER = VAE3DConfig(width=8, width_multipliers=(1, 1))
DENOISER = UNet3DConfig(width=8, width_multipliers=(1,), num_res_blocks=1, attention_levels=())


def trained_like() -> tuple[LatentDiffusion, dict[str, torch.nn.Module]]:
    """With the scale that training would measure, and a denoiser whose every weight counts."""
    torch.manual_seed(0)
    vae = ShapeVAEConfig().build(resolution=RESOLUTION, num_classes=5).build_networks(AUTOENCODER)
    config = LatentDiffusionConfig(codec="somewhere").with_taken(ShapeVAEConfig(), AUTOENCODER, vae, [batch_of(64)])
    method = config.build(resolution=RESOLUTION, num_classes=2)
    networks = method.build_networks(DENOISER)
    networks["vae"].load_state_dict(method.taken_weights(vae)["vae"])
    torch.nn.init.normal_(networks["denoiser"].conv_out.weight, std=0.1)  # type: ignore[arg-type, union-attr]
    return method, networks


def pipeline_of(folder: Path) -> tuple[ShapePipeline, LatentDiffusion, dict[str, torch.nn.Module]]:
    method, networks = trained_like()
    config = ExportConfig(RESOLUTION, "occupancy", ("ball", "bar"), method.config, DENOISER)
    states = {name: network.state_dict() for name, network in networks.items()}
    write_export(folder / "export", config, states, dtype=torch.float32)
    return ShapePipeline.from_pretrained(folder / "export"), method, networks


def test_the_draws_that_are_diffused_have_mean_0_and_variance_1() -> None:
    """Not their means alone: where these say next to nothing, as in a channel that collapsed, a draw is mostly sigma eps."""
    method, networks = trained_like()
    posterior = networks["vae"].encode(batch_of(64)["voxels"])  # type: ignore[operator]
    torch.manual_seed(0)
    z = method._scaled(posterior.draw(torch.randn(200, *posterior.mean.shape))).view(-1, 8)
    torch.testing.assert_close(z.mean(0), torch.zeros(8), rtol=0, atol=0.02)
    torch.testing.assert_close(z.std(0), torch.ones(8), rtol=0.02, atol=0)
    z = method._scaled(posterior.mean).view(-1, 8)
    torch.testing.assert_close(method._scaled(method._unscaled(z.view(8, -1))), z.view(8, -1))
    assert bool((posterior.log_variance / 2).exp().mean() > posterior.mean.std())  # a test of the means would not do


def test_the_loss_is_that_of_diffusion_on_drawn_latents() -> None:
    method, networks = trained_like()
    batch, seeds = batch_of(6), range(10, 16)
    found = method.loss(networks, batch, seeds)
    noise = NoiseSource(seeds)
    posterior = networks["vae"].encode(batch["voxels"])  # type: ignore[operator]
    z = posterior.mean + (posterior.log_variance / 2).exp() * noise.normal(posterior.mean.shape[1])
    mean, std = (
        torch.tensor(values).repeat(z.shape[1] // 8) for values in (method.config.latent_mean, method.config.latent_std)
    )
    side = method.resolution_of("denoiser")
    plain = VoxelDiffusion(method.config.diffusion, resolution=side, num_classes=2, clip_x0=False)
    expected = plain.loss_of(networks, ((z - mean) / std).detach(), batch["label"], noise)
    assert torch.equal(found.loss, expected.loss) and torch.equal(found.t, expected.t)
    found.loss.backward()
    assert all(p.grad is None for p in networks["vae"].parameters())


def test_a_sample_is_the_decoded_walk_and_is_not_clamped_on_its_way(tmp_path: Path) -> None:
    """With a denoiser that says v = 0, x_0 = sqrt(abar) x_t: the walk ends far outside [-1, 1] where the noise is."""
    pipeline, method, networks = pipeline_of(tmp_path)
    for network in (pipeline._networks["float32"]["denoiser"], networks["denoiser"]):
        torch.nn.init.zeros_(network.conv_out.weight)  # type: ignore[arg-type, union-attr]
    label, seeds = torch.tensor([0, 1]), [3, 4]
    config = SampleConfig(num_steps=1, guidance_scale=1.0)
    found = method.sample(networks, label, seeds, config=config)
    abar = float(method.diffusion.schedule.abar(torch.tensor(method.num_timesteps - 1)))
    z = abar**0.5 * NoiseSource(seeds).normal(method.diffusion.resolution**3)
    torch.testing.assert_close(found, signal_of(networks["vae"].decode(method._unscaled(z))))  # type: ignore[operator]
    wide = method.diffusion.sample(
        {"denoiser": lambda x, t, y: -100 * x},
        label,
        seeds,
        config=config,  # type: ignore[dict-item]
    )
    assert float(wide.abs().max()) > 10


def test_the_export_is_whole(tmp_path: Path) -> None:
    """Scale, sizes and weights of the autoencoder are in it, and of where it came from nothing."""
    pipeline, method, _ = pipeline_of(tmp_path)
    export = read_export(tmp_path / "export")
    assert export.config.method == method.config
    assert method.config.codec is None and min(method.config.latent_std) > 0
    assert export.networks["vae"].prior.shape[0] == 1  # type: ignore[union-attr]
    shapes = pipeline(2, label="bar", num_steps=3, precision="float32")
    torch.testing.assert_close(
        shapes.voxels, ShapePipeline(export)(2, label="bar", num_steps=3, precision="float32").voxels
    )


def test_kept_voxels_are_exact_and_whole_cells_stay_as_latents(tmp_path: Path) -> None:
    pipeline, method, _ = pipeline_of(tmp_path)
    given = pipeline(1, seed=9, num_steps=2).voxels[0]
    keep = torch.zeros(RESOLUTION, RESOLUTION, RESOLUTION, dtype=torch.bool)
    keep[:5] = True  # one cell of side 4 and a quarter of the next
    found = pipeline.complete(given, keep, 2, num_steps=4, num_resamples=1).voxels
    assert torch.equal(found[:, keep], given[keep].expand(2, -1))
    assert float((found[0] - found[1])[~keep].abs().max()) > 1e-4
    kept = method._kept_latents(dense_to_morton(keep))
    assert int(kept.sum()) == 4 * 8  # four cells of eight numbers


def test_mirrored_shapes_are_symmetric_to_the_voxel(tmp_path: Path) -> None:
    pipeline, _, _ = pipeline_of(tmp_path)
    plain = pipeline(2, seed=1, num_steps=3).voxels
    found = pipeline(2, seed=1, num_steps=3, mirror="x").voxels
    assert torch.equal(found, found.flip(1)) and not torch.equal(plain, plain.flip(1))
    assert torch.equal(found[:, :4], plain[:, :4])  # one half is what it was


def test_a_variation_of_strength_0_is_the_shape_itself(tmp_path: Path) -> None:
    pipeline, _, _ = pipeline_of(tmp_path)
    given = pipeline(1, seed=2, num_steps=2).voxels[0]
    assert torch.equal(pipeline.vary(given, 0.0).voxels[0], given)
    assert not torch.equal(pipeline.vary(given, 0.5, num_steps=4).voxels[0], given)


def test_inversion_finds_the_noise_of_a_shapes_latents(tmp_path: Path) -> None:
    """Through 200 steps there and back: the latents of the shape, so what the autoencoder makes of it."""
    _, method, networks = pipeline_of(tmp_path)
    x, label = batch_of(1)["voxels"], torch.tensor([1])
    config = SampleConfig(num_steps=200, guidance_scale=1.0)
    with torch.no_grad():
        x_T = method.invert(networks, label, x, config=config)
        again = method.sample(networks, label, [0], config=config, edit=Edit(x_T=x_T))
        expected = signal_of(networks["vae"].decode(networks["vae"].encode(x).mean))  # type: ignore[operator]
    assert x_T.shape == (1, method.diffusion.resolution**3)
    assert float((again - expected).abs().max()) < 0.02


def test_what_does_not_fit_is_said() -> None:
    method, networks = trained_like()
    with pytest.raises(ConfigError, match=r"patch_size=4 does not fit latents of 8 channels a cell; use 2"):
        method.build_networks(replace(DENOISER, patch_size=4))
    with pytest.raises(ConfigError, match="trains a denoiser"):
        method.build_networks(OctreeTransformerConfig())
    with pytest.raises(ConfigError, match="is no autoencoder"):
        method.config.with_taken(method.diffusion.config, DENOISER, networks, [])
    again = LatentDiffusionConfig(codec="a").with_taken(method.config, DENOISER, networks, [])
    assert again == method.config  # from another latent diffusion: its autoencoder and its scale
    with pytest.raises(ValueError, match="one a channel"):
        LatentDiffusionConfig(latent_mean=(0.0,), latent_std=(1.0,))
