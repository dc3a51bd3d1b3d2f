"""What the tests of training share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shapediff.data.importing import import_voxels


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Balls and bars at 16^3."""
    folder, rng = tmp_path_factory.mktemp("grids"), np.random.default_rng(0)
    axis = np.arange(16) - 7.5
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    balls = np.stack([radius < r for r in rng.uniform(3, 7, 40)])
    bars = np.zeros((40, 16, 16, 16), bool)
    for bar, height in zip(bars, rng.integers(4, 15, 40), strict=True):
        bar[6:10, 1 : 1 + height, 6:10] = True
    np.savez(folder / "ball.npz", balls)
    np.savez(folder / "bar.npz", bars)
    import_voxels(folder, folder.with_name(folder.name + "-voxels"))
    return folder.with_name(folder.name + "-voxels")
