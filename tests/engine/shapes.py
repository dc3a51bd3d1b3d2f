"""A small data set of noise, of one class."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shapediff.data.dataset import ShapeDataset
from shapediff.data.importing import import_voxels


def noise_shapes(folder: Path, num: int) -> ShapeDataset:
    """The training split of `num` grids of 8^3, in `folder`/voxels."""
    grids = np.random.default_rng(0).random((num, 8, 8, 8)) < 0.4
    (folder / "grids").mkdir()
    np.savez(folder / "grids" / "ball.npz", grids)
    import_voxels(folder / "grids", folder / "voxels")
    return ShapeDataset(folder / "voxels", split="train")
