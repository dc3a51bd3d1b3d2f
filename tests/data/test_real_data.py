"""Real grids and meshes, where they are at hand (see `shared_data` in tests/conftest.py)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from numba import njit
from scipy.ndimage import label

from shapediff.data.dataset import ShapeDataset
from shapediff.data.importing import import_voxels
from shapediff.data.preparation import prepare
from shapediff.data.verification import verify_dataset
from shapediff.geometry.mesh import load_mesh, normalize_mesh
from shapediff.geometry.voxelize import find_solid, signed_distance, voxelize
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


def test_one_command_accounts_for_every_mesh(shared_data: Path, tmp_path: Path) -> None:
    """Classic and furniture meshes: two are flat and say so, everything else is solid."""
    summary = prepare(shared_data / "meshes", tmp_path, resolution=32, workers=2)
    lines = {line["source"]: line for line in map(json.loads, (tmp_path / "report.jsonl").read_text().splitlines())}
    files = {path.relative_to(shared_data / "meshes").as_posix() for path in (shared_data / "meshes").rglob("*.obj")}
    assert set(lines) == files and summary.num_ok == len(files) - 2
    flat = {name for name, line in lines.items() if line["status"] == "skipped"}
    assert flat == {"classic/alligator.obj", "classic/woody.obj"}
    assert all("is flat" in lines[name]["reason"] for name in flat)
    assert all(lines[name]["fill"] > 0.002 and lines[name]["method"] for name in files - flat)
    assert not verify_dataset(tmp_path).damaged


def num_parts_at_feet(path: Path, resolution: int) -> int:
    """How many separate parts a horizontal slice cuts, a twelfth of the height above the floor."""
    mesh, _ = normalize_mesh(load_mesh(path))
    height = mesh.extents[1]
    level = int((0.5 - height / 2 + 0.08 * height) * resolution)
    _, num = label(voxelize(mesh, resolution=resolution, normalize=False)[:, level], np.ones((3, 3)))
    return num


def test_thin_legs_are_there_at_32(shared_data: Path) -> None:
    furniture = shared_data / "meshes" / "furniture"
    paths = sorted(path for name in ("chair", "table", "stool", "cabinet") for path in (furniture / name).glob("*.obj"))
    found = {path.stem: num_parts_at_feet(path, 32) for path in paths}
    assert len(found) >= 14
    # The low table stands on two boards; one cabinet on the floor.
    assert found == {path.stem: num_parts_at_feet(path, 128) for path in paths}
    assert sum(num == 4 for num in found.values()) >= 13


@njit(cache=True)
def winding_numbers(triangles, points):  # type: ignore[no-untyped-def]
    """The generalised winding number (Jacobson et al. 2013): the solid angles of all triangles over 4 pi."""
    total = np.zeros(len(points))
    for i in range(len(points)):
        for n in range(len(triangles)):
            ax, ay, az = triangles[n, 0] - points[i]
            bx, by, bz = triangles[n, 1] - points[i]
            cx, cy, cz = triangles[n, 2] - points[i]
            a, b, c = np.sqrt(ax**2 + ay**2 + az**2), np.sqrt(bx**2 + by**2 + bz**2), np.sqrt(cx**2 + cy**2 + cz**2)
            triple = ax * (by * cz - bz * cy) + ay * (bz * cx - bx * cz) + az * (bx * cy - by * cx)
            dots = (
                (ax * bx + ay * by + az * bz) * c
                + (bx * cx + by * cy + bz * cz) * a
                + (cx * ax + cy * ay + cz * az) * b
            )
            total[i] += 2 * np.arctan2(triple, a * b * c + dots)
    return total / (4 * np.pi)


def test_every_closed_mesh_agrees_with_the_winding_number(shared_data: Path) -> None:
    """IoU at 64^3 of at least 0.99, on as many voxels as the reference can do soon.

    Centres within 0.001 voxel of a face are left out: the winding number jumps there.
    """
    resolution, scores = 64, {}
    axis = (np.arange(resolution) + 0.5) / resolution - 0.5
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    for path in sorted((shared_data / "meshes").rglob("*.obj")):
        mesh = normalize_mesh(load_mesh(path))[0]
        if not (mesh.is_watertight and mesh.is_volume):
            continue
        solid = find_solid(mesh, resolution=resolution).grid
        in_box = (np.abs(points) <= mesh.extents / 2 + 1 / resolution).all(1)
        clear = np.abs(signed_distance(mesh, solid, truncation=1.0)).ravel() > 1e-3
        chosen = np.flatnonzero(in_box & clear)
        most = int(8e6 / len(mesh.faces))
        if len(chosen) > most:
            chosen = np.random.default_rng(0).choice(chosen, most, replace=False)
        expected = winding_numbers(np.ascontiguousarray(mesh.triangles), points[chosen]) > 0.5
        found = solid.ravel()[chosen]
        scores[path.stem] = (expected & found).sum() / (expected | found).sum()
    assert len(scores) >= 26
    assert min(scores.values()) >= 0.99, sorted(scores.items(), key=lambda item: item[1])[:3]
