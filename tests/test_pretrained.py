"""The model that comes with shapediff: it is there, says where it comes from, and makes chairs."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from scipy import ndimage

from shapediff.hub import PRETRAINED_FOLDER, default_checkpoint, pretrained_names
from shapediff.pipeline import ShapePipeline

MAX_BYTES = 40e6


def test_it_is_there_small_and_says_what_it_is(tmp_path: Path) -> None:
    assert pretrained_names() == ["shapes32"]
    assert default_checkpoint(tmp_path) == PRETRAINED_FOLDER / "shapes32"
    files = [path for path in (PRETRAINED_FOLDER / "shapes32").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < MAX_BYTES
    assert {path.suffix for path in files} == {".json", ".safetensors", ".md"}
    card = (PRETRAINED_FOLDER / "shapes32" / "README.md").read_text(encoding="utf-8")
    for told in ("license: apache-2.0", "make_shapes.py", "conf/experiment/latent32.yaml", "1-NNA", "Hardware"):
        assert told in card


@pytest.fixture(scope="module")
def chairs() -> np.ndarray:
    pipeline = ShapePipeline.from_pretrained("shapes32")
    return pipeline(6, label="chair", num_steps=12, sampler="dpm_solver", seed=0).voxels.numpy() > 0


def test_chairs_are_as_high_as_their_cube_and_most_hold_together(chairs: np.ndarray) -> None:
    largest = []
    for chair in chairs:
        parts, _ = ndimage.label(chair)
        largest.append(np.bincount(parts.ravel())[1:].max() / chair.sum())
        heights = np.flatnonzero(chair.any((0, 2)))
        assert heights[-1] - heights[0] > 24  # of 32 voxels
    assert np.mean(np.array(largest) > 0.9) > 0.5, largest


def test_chairs_differ(chairs: np.ndarray) -> None:
    for i in range(len(chairs)):
        for j in range(i):
            assert (chairs[i] & chairs[j]).sum() < 0.9 * (chairs[i] | chairs[j]).sum()
