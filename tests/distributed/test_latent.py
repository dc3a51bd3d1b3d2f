"""An autoencoder, and diffusion of its latents, where it is frozen: the same on one rank and on two, resumed, exported whole."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shapediff.checkpoint import read_export
from shapediff.engine.exporting import export_run
from shapediff.pipeline import ShapePipeline
from tests.distributed.forked import ForkedRanks
from tests.distributed.test_state import EPS, Recipe, assert_same_state, read

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

SIZES = {"width": 8, "width_multipliers": [1, 1]}


@pytest.fixture(scope="module")
def ranks() -> Iterator[ForkedRanks]:
    with ForkedRanks() as server:
        yield server


class Autoencoder(Recipe):
    def config(self, run: str, stage: int, **loop: Any) -> dict[str, Any]:
        config = super().config(run, stage, **({"steps": 6, "checkpoint_every": 3} | loop))
        return config | {"model": {"name": "vae3d", **SIZES}, "method": {"name": "shape_vae"}}


class Latent(Recipe):
    def config(self, run: str, stage: int, **loop: Any) -> dict[str, Any]:
        config = super().config(run, stage, **({"steps": 6, "checkpoint_every": 3} | loop))
        return config | {"method": {"name": "latent_diffusion", "codec": str(self.folder / "vae")}}


@pytest.fixture(scope="module")
def folder(ranks: ForkedRanks, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With an autoencoder trained by one process, as the run "vae"."""
    folder = tmp_path_factory.mktemp("latent")
    assert ranks.train(Autoencoder(data, folder).config("vae", 0), ranks=1, eps=EPS).codes == [0]
    return folder


@pytest.fixture(scope="module")
def latent(ranks: ForkedRanks, data: Path, folder: Path) -> Latent:
    """A run of one process, "one"."""
    recipe = Latent(data, folder)
    assert ranks.train(recipe.config("one", 0), ranks=1, eps=EPS).codes == [0]
    return recipe


@pytest.mark.parametrize("stage", [1, 3])
def test_an_autoencoder_learns_the_same_on_two_ranks(ranks: ForkedRanks, data: Path, folder: Path, stage: int) -> None:
    recipe, run = Autoencoder(data, folder), f"vae{stage}"
    assert ranks.train(recipe.config(run, stage), ranks=2, eps=EPS).codes == [0, 0]
    np.testing.assert_allclose(recipe.losses(run), recipe.losses("vae"), rtol=1e-5)
    for key, value in recipe.export("vae").items():
        torch.testing.assert_close(recipe.export(run)[key], value, rtol=1e-4, atol=1e-6, msg=key)


def test_latents_out_of_the_cache_teach_the_same_on_two_ranks(ranks: ForkedRanks, latent: Latent) -> None:
    """Up to the rounding of half precision. Nobody but rank 0 writes the file."""
    config = latent.config("cached", 2)
    config["data"] = {**config["data"], "cache_latents": True}
    assert ranks.train(config, ranks=2, eps=EPS).codes == [0, 0]
    np.testing.assert_allclose(latent.losses("cached"), latent.losses("one"), rtol=2e-3)
    assert len(list((Path(config["data"]["path"]) / "latents").glob("*.npy"))) == 1


@pytest.mark.parametrize("stage", [2, 3])
def test_latents_are_learnt_the_same_on_two_ranks(ranks: ForkedRanks, latent: Latent, stage: int) -> None:
    run = f"zero{stage}"
    assert ranks.train(latent.config(run, stage), ranks=2, eps=EPS).codes == [0, 0]
    np.testing.assert_allclose(latent.losses(run), latent.losses("one"), rtol=1e-4)
    found, expected = (read(latent.states(name)[-1], "ema") for name in (run, "one"))
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-5, msg=key)


def test_the_autoencoder_stays_as_it_was_and_the_export_is_whole(latent: Latent, tmp_path: Path) -> None:
    run = latent.folder / "one"
    assert {name.split(".")[0] for name in read(latent.states("one")[-1], "weight")} == {"denoiser"}
    frozen = read_export(latent.folder / "vae").networks["vae"].state_dict()
    for key, value in read_export(run).networks["vae"].state_dict().items():
        assert torch.equal(value, frozen[key][-1:] if key == "prior" else frozen[key]), key
    export_run(run, tmp_path / "out")
    for file in ("config.json", "model.safetensors", "README.md"):
        assert (tmp_path / "out" / file).read_bytes() == (run / "export" / file).read_bytes()
    assert ShapePipeline.from_pretrained(run)(2, label="ball", num_steps=2).voxels.shape == (2, 8, 8, 8)


def test_killed_and_resumed_is_the_same_run_though_the_autoencoder_is_gone(ranks: ForkedRanks, latent: Latent) -> None:
    config = latent.config("killed", 2)
    assert ranks.train(config, ranks=2, eps=EPS, die_after_step=5).codes[0] == -9
    config["method"]["codec"] = str(latent.folder / "nothing")
    resumed = ranks.train(config, ranks=2, eps=EPS)
    assert resumed.codes == [0, 0] and "at step 3" in resumed.log
    assert_same_state(latent.states("killed")[-1], latent.states("zero2")[-1])
