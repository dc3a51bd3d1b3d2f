"""Cached latents: what encoding gives each time, and computed once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from shapediff.data.augment import seeds_of_versions, versions_of
from shapediff.data.dataset import ShapeDataset
from shapediff.data.sampler import sample_seeds
from shapediff.engine.latents import LATENTS_FOLDER, cached_latents
from shapediff.errors import DataError
from shapediff.methods import LatentDiffusionConfig, ShapeVAEConfig
from shapediff.models import UNet3DConfig, VAE3DConfig
from tests.engine.shapes import noise_shapes

AUTOENCODER = VAE3DConfig(width=8, width_multipliers=(1, 1))
DENOISER = UNet3DConfig(width=8, width_multipliers=(1,), num_res_blocks=1, attention_levels=())
CPU = torch.device("cpu")


@pytest.fixture
def dataset(tmp_path: Path) -> ShapeDataset:
    return noise_shapes(tmp_path, 40)


@pytest.mark.parametrize("mirror", [False, True])
@pytest.mark.parametrize("turn", [False, True])
def test_training_on_the_cache_is_training_on_the_shapes(dataset: ShapeDataset, mirror: bool, turn: bool) -> None:
    """The same loss from the same seeds, up to the rounding of half precision, for every mirror image and turn."""
    torch.manual_seed(0)
    vae = ShapeVAEConfig().build(resolution=8, num_classes=1).build_networks(AUTOENCODER)
    torch.nn.init.normal_(vae["vae"].to_latent.weight)  # type: ignore[arg-type, union-attr]
    whole = {
        "voxels": dataset.batch([*range(len(dataset))])["voxels"],
        "label": torch.zeros(len(dataset), dtype=torch.int64),
    }
    config = LatentDiffusionConfig(codec="vae").with_taken(ShapeVAEConfig(), AUTOENCODER, vae, [whole])  # type: ignore[list-item]
    method = config.build(resolution=8, num_classes=1)
    networks = method.build_networks(DENOISER)
    networks["vae"].load_state_dict(method.taken_weights(vae)["vae"])
    torch.nn.init.normal_(networks["denoiser"].conv_out.weight, std=0.1)  # type: ignore[arg-type, union-attr]
    frozen = {"vae": networks["vae"]}
    cache = cached_latents(dataset, frozen, lambda x: method.encode(frozen, x), mirror=mirror, turn=turn, device=CPU)

    indices, seeds = np.arange(len(dataset))[::-1].copy(), sample_seeds(3, np.arange(len(dataset)))
    given = {"mirror_seeds": seeds if mirror else None, "turn_seeds": seeds if turn else None}
    expected = method.loss(networks, dataset.batch(indices, **given), seeds.tolist())  # type: ignore[arg-type]
    found = method.loss(networks, cache.batch(indices, **given), seeds.tolist())  # type: ignore[arg-type]
    torch.testing.assert_close(found.per_sample, expected.per_sample, rtol=5e-3, atol=1e-3)
    assert torch.equal(found.t, expected.t) and torch.equal(found.label, expected.label)
    other = method.loss(networks, cache.batch(np.roll(indices, 1), **given), seeds.tolist())  # type: ignore[arg-type]
    assert float((other.per_sample - expected.per_sample).abs().max()) > 0.01  # a test of the order


def test_latents_are_computed_once_for_the_same_weights_and_data(dataset: ShapeDataset) -> None:
    network, calls = torch.nn.Linear(512, 3), []

    def encode(x: Tensor) -> Tensor:
        calls.append(len(x))
        return network(x)

    def cached(**images: bool) -> Tensor:
        found = cached_latents(
            dataset, {"vae": network}, encode, **{"mirror": False, "turn": False, **images}, device=CPU
        )
        return found.batch(np.array([5]))["latents"]

    first = cached()
    once = len(calls)
    assert sum(calls) == len(dataset) and torch.equal(cached(), first) and len(calls) == once
    assert torch.equal(cached(mirror=True), first) and len(calls) == 3 * once
    with torch.no_grad():
        network.bias += 1
    torch.testing.assert_close(cached(), first + 1, rtol=0, atol=2e-2)
    assert len(list((dataset.path / LATENTS_FOLDER).glob("*.npy"))) == 3


def test_nothing_half_written_stays_and_what_does_not_fit_is_refused(dataset: ShapeDataset) -> None:
    def encode(x: Tensor) -> Tensor:
        return x[:, :4] * 1e5

    with pytest.raises(DataError, match="do not fit half precision"):
        cached_latents(dataset, {}, encode, mirror=False, turn=False, device=CPU)
    assert not list((dataset.path / LATENTS_FOLDER).glob("*.npy"))


def test_images_and_seeds_are_inverse() -> None:
    versions = np.arange(8)
    seeds = seeds_of_versions(versions)
    assert versions_of(8, mirror_seeds=seeds, turn_seeds=seeds).tolist() == versions.tolist()
    assert versions_of(8, mirror_seeds=seeds, turn_seeds=None).tolist() == (versions % 2).tolist()
