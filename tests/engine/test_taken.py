"""Networks that a run takes from another: copied once, checked against the data, and the settings that come of them."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shapediff.checkpoint import ExportConfig, read_export, write_export
from shapediff.data.dataset import ShapeDataset
from shapediff.engine.config import DataConfig, LoopConfig, TrainConfig
from shapediff.engine.exporting import taken_weights
from shapediff.engine.taken import with_taken
from shapediff.errors import CheckpointError, ConfigError
from shapediff.methods import LatentDiffusionConfig, ShapeVAEConfig
from shapediff.models import UNet3DConfig, VAE3DConfig
from tests.engine.shapes import noise_shapes

AUTOENCODER = VAE3DConfig(width=8, width_multipliers=(1, 1))


@pytest.fixture
def dataset(tmp_path: Path) -> ShapeDataset:
    return noise_shapes(tmp_path, 6)


def autoencoder(folder: Path, *, resolution: int = 8, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    config = ExportConfig(resolution, "occupancy", ("a", "b", "c"), ShapeVAEConfig(), AUTOENCODER)
    networks = config.build_method().build_networks(AUTOENCODER)
    states = {name: network.state_dict() for name, network in networks.items()}
    write_export(folder, config, states, dtype=torch.float32)
    return folder


def run_of(tmp_path: Path, codec: Path | None, **loop: str) -> TrainConfig:
    method = LatentDiffusionConfig(codec=None if codec is None else str(codec))
    data = DataConfig(path=str(tmp_path / "voxels"))
    return TrainConfig(run_dir=str(tmp_path / "run"), data=data, method=method, train=LoopConfig(**loop))  # type: ignore[arg-type]


def test_the_copy_is_all_that_is_needed_from_then_on(tmp_path: Path, dataset: ShapeDataset) -> None:
    codec = autoencoder(tmp_path / "vae")
    first = with_taken(run_of(tmp_path, codec), dataset)
    codec.rename(tmp_path / "elsewhere")
    assert with_taken(run_of(tmp_path, codec), dataset) == first
    assert isinstance(first.method, LatentDiffusionConfig) and first.method.autoencoder == AUTOENCODER
    assert len(first.method.latent_std) == 8 and min(first.method.latent_std) > 0
    method = first.method.build(resolution=8, num_classes=1)
    weights = taken_weights(first.run_path, method)
    denoiser = UNet3DConfig(width=8, width_multipliers=(1,), attention_levels=())
    method.build_networks(denoiser)["vae"].load_state_dict(weights["vae"])  # though it knew three classes


def test_another_codec_than_the_copy_is_told(
    tmp_path: Path, dataset: ShapeDataset, caplog: pytest.LogCaptureFixture
) -> None:
    first = with_taken(run_of(tmp_path, autoencoder(tmp_path / "vae")), dataset)
    assert with_taken(run_of(tmp_path, tmp_path / "vae"), dataset) == first and not caplog.records
    assert with_taken(run_of(tmp_path, autoencoder(tmp_path / "other", seed=1)), dataset) == first
    assert "other weights than" in caplog.text and "goes on with its own" in caplog.text


def test_without_a_codec_it_is_that_of_the_export_to_start_from(tmp_path: Path, dataset: ShapeDataset) -> None:
    codec = autoencoder(tmp_path / "vae")
    assert with_taken(run_of(tmp_path, None, init_from=str(codec)), dataset) == replace(
        with_taken(run_of(tmp_path, codec), dataset), train=LoopConfig(init_from=str(codec))
    )


def test_what_is_missing_or_does_not_fit_is_said(tmp_path: Path, dataset: ShapeDataset) -> None:
    with pytest.raises(ConfigError, match=r"needs method.codec=RUN"):
        with_taken(run_of(tmp_path, None), dataset)
    with pytest.raises(CheckpointError, match="no checkpoint at"):
        with_taken(run_of(tmp_path, tmp_path / "nothing"), dataset)
    assert not (tmp_path / "run" / "taken").exists()
    with pytest.raises(ConfigError, match="is of resolution=16, the data of resolution=8"):
        with_taken(run_of(tmp_path, autoencoder(tmp_path / "other", resolution=16)), dataset)
    assert not (tmp_path / "run" / "taken").exists()  # so that another one can be named


def test_weights_to_start_from_say_the_scale_of_their_own_latents(tmp_path: Path, dataset: ShapeDataset) -> None:
    """Measured again on other shapes it would differ a little, and the denoiser be refused. Another codec is taken."""
    codec = autoencoder(tmp_path / "vae")
    there = LatentDiffusionConfig(autoencoder=AUTOENCODER, latent_mean=(0.5,) * 8, latent_std=(2.0,) * 8)
    denoiser = UNet3DConfig(width=8, width_multipliers=(1,), attention_levels=())
    method = there.build(resolution=8, num_classes=2)
    networks = method.build_networks(denoiser)
    networks["vae"].load_state_dict(method.taken_weights(read_export(codec).networks)["vae"])
    states = {name: network.state_dict() for name, network in networks.items()}
    write_export(
        tmp_path / "start", ExportConfig(8, "occupancy", ("x", "y"), there, denoiser), states, dtype=torch.float32
    )
    found = with_taken(run_of(tmp_path, codec, init_from=str(tmp_path / "start")), dataset)
    assert found.method == there
    shutil.rmtree(tmp_path / "run")
    other = with_taken(
        run_of(tmp_path, autoencoder(tmp_path / "other", seed=1), init_from=str(tmp_path / "start")), dataset
    )
    assert isinstance(other.method, LatentDiffusionConfig) and other.method.latent_std != there.latent_std
