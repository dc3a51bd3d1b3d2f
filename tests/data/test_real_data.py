"""Real grids and meshes, where they are at hand (see `shared_data` in tests/conftest.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from shapediff.data.dataset import ShapeDataset
from shapediff.data.importing import import_voxels
from shapediff.data.preparation import prepare
from shapediff.data.verification import verify_dataset
from shapediff.grid.morton import morton_to_dense

pytestmark = pytest.mark.realdata


def test_modelnet_chairs_stand_upright_and_face_plus_z(shared_data: Path, tmp_path: Path) -> None:
    import_voxels(shared_data / "modelnet10-voxels", tmp_path, up="z", turns={"monitor": 1})
    dataset = ShapeDataset(tmp_path)
    assert dataset.classes == ["chair", "monitor"] and np.bincount(dataset.labels).tolist() == [672, 361]
    chairs = morton_to_dense(dataset.batch(np.flatnonzero(dataset.labels == 0))["voxels"].numpy()) > 0
    places = np.arange(32)
    top = chairs[:, :, 24:, :].sum(axis=(1, 2))  # (n, z): the upper quarter of a chair is its back
    seat = chairs[:, :, 8:20, :].sum(axis=(1, 2))
    back_z = (top @ places) / np.maximum(top.sum(1), 1)
    seat_z = (seat @ places) / np.maximum(seat.sum(1), 1)
    faces_front = (back_z < seat_z)[top.sum(1) > 0]
    assert faces_front.mean() > 0.95
    monitors = morton_to_dense(dataset.batch(np.flatnonzero(dataset.labels == 1))["voxels"].numpy()) > 0
    width, depth = (monitors.any(axis=axes).sum(1) for axes in ((2, 3), (1, 2)))
    assert (width > depth).mean() > 0.9


def test_furniture_prepares_whole(shared_data: Path, tmp_path: Path) -> None:
    summary = prepare(shared_data / "meshes" / "furniture", tmp_path, resolution=32, workers=0, limit=1)
    assert summary.num_ok == len(summary.num_per_class) == 13
    assert not verify_dataset(tmp_path).damaged
