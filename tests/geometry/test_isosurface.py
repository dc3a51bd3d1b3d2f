"""Surfaces of grids: closed and oriented whatever the field, where the voxels are, of the right size."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh

from shapediff.errors import MeshError
from shapediff.geometry.export import MESH_SUFFIXES, remove_floaters, write_mesh
from shapediff.geometry.isosurface import voxels_to_mesh


def centres(resolution: int) -> np.ndarray:
    axis = (np.arange(resolution) + 0.5) / resolution - 0.5
    return np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1)


def ball(resolution: int, radius: float) -> np.ndarray:
    """A signal: the distance to the surface in voxels, cut to [-1, 1], positive inside."""
    return np.clip((radius - np.linalg.norm(centres(resolution), axis=-1)) * resolution, -1, 1).astype(np.float32)


def assert_solid(mesh: trimesh.Trimesh) -> None:
    assert mesh.is_watertight
    assert mesh.is_winding_consistent
    assert mesh.volume > 0
    _, counts = np.unique(mesh.edges_sorted, axis=0, return_counts=True)
    assert (counts == 2).all()
    assert (mesh.area_faces > 0).all()


@pytest.mark.parametrize("resolution", [16, 32, 64])
def test_ball_has_its_volume_and_area(resolution: int) -> None:
    """Linear interpolation of a distance field is exact to second order: the error is below (1 / voxels of radius)^2."""
    mesh = voxels_to_mesh(ball(resolution, 0.4), smooth=0)
    assert_solid(mesh)
    bound = (0.4 * resolution) ** -2
    assert abs(mesh.volume / (4 / 3 * np.pi * 0.4**3) - 1) < bound
    assert abs(mesh.area / (4 * np.pi * 0.4**2) - 1) < bound
    np.testing.assert_allclose(mesh.bounds, [[-0.4] * 3, [0.4] * 3], atol=0.1 / resolution)


def test_fields_say_where_the_inside_is() -> None:
    signal = ball(32, 0.3)
    meshes = [
        voxels_to_mesh(signal, smooth=0),
        voxels_to_mesh(-signal, field="tsdf", smooth=0),
        voxels_to_mesh((signal + 1) / 2, field="occupancy", smooth=0),
    ]
    for mesh in meshes:
        assert mesh.volume == pytest.approx(meshes[0].volume, rel=1e-2)
    boolean = voxels_to_mesh(signal > 0, smooth=0)
    assert boolean.volume == pytest.approx(((signal > 0).sum()) / 32**3, rel=0.05)


def test_mesh_lies_where_its_voxels_are() -> None:
    occupancy = np.zeros((8, 8, 8), bool)
    occupancy[1:3, 4, 7] = True
    mesh = voxels_to_mesh(occupancy, smooth=0)
    # The surface of a binary grid lies half-way between centres: half a voxel out on each side.
    np.testing.assert_allclose(mesh.bounds[0], np.array([1, 4, 7]) / 8 - 0.5, atol=1e-6)
    np.testing.assert_allclose(mesh.bounds[1], np.array([3, 5, 8]) / 8 - 0.5, atol=1e-6)


def _checkerboard(n: int) -> np.ndarray:
    return (np.indices((n, n, n)).sum(0) % 2 == 0) * 2.0 - 1.0


def _fields() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shell = np.full((16, 16, 16), -1.0)
    shell[3:13, 3:13, 3:13] = 1
    shell[4:12, 4:12, 4:12] = -1
    by_edge, by_corner = np.full((6, 6, 6), -1.0), np.full((6, 6, 6), -1.0)
    by_edge[2, 2, 2] = by_edge[3, 3, 2] = 1
    by_corner[2, 2, 2] = by_corner[3, 3, 3] = 1
    return {
        "noise": rng.normal(size=(12, 12, 12)),
        "signs": rng.choice([-1.0, 1.0], size=(12, 12, 12)),
        "zeros and ones": rng.choice([0.0, 1e-9, -1e-9, 1.0], size=(10, 10, 10)),
        "checkerboard": _checkerboard(8),
        "shell": shell,
        "edge": by_edge,
        "corner": by_corner,
        "full": np.ones((4, 4, 4)),
        "one voxel": np.pad(np.ones((1, 1, 1)), 2, constant_values=-1),
        "one voxel of one": np.ones((1, 1, 1)),
    }


@pytest.mark.parametrize("name", _fields())
def test_every_field_gives_a_closed_oriented_mesh(name: str) -> None:
    assert_solid(voxels_to_mesh(_fields()[name], smooth=0))


@pytest.mark.parametrize("seed", range(20))
def test_random_signs_give_a_closed_oriented_mesh(seed: int) -> None:
    rng = np.random.default_rng(seed)
    assert_solid(voxels_to_mesh(np.where(rng.random((10, 10, 10)) < rng.uniform(0.05, 0.9), 1.0, -1.0), smooth=0))


@pytest.mark.parametrize(
    ("voxels", "message"),
    [
        (np.full((4, 4, 4), -1.0), "empty"),
        (np.full((4, 4, 4), np.nan), "not finite"),
        (np.ones((4, 4, 5)), r"\(4, 4, 5\)"),
        (np.ones((0, 0, 0)), r"\(0, 0, 0\)"),
    ],
)
def test_what_has_no_surface_is_refused(voxels: np.ndarray, message: str) -> None:
    with pytest.raises(MeshError, match=message):
        voxels_to_mesh(voxels)


def test_floaters_go_and_parts_stay() -> None:
    signal = np.full((16, 16, 16), -1.0, np.float32)
    signal[:6, :6, :6] = 0.5  # 216 voxels
    signal[10:13, 10:13, 10:13] = 0.5  # 27, above 5 %
    signal[15, 15, 15] = 0.5
    cleaned = remove_floaters(signal)
    assert (cleaned > 0).sum() == 216 + 27
    assert cleaned[15, 15, 15] == -1
    assert signal[15, 15, 15] == 0.5
    assert np.array_equal(remove_floaters(cleaned), cleaned)


def test_a_slanted_leg_is_one_part() -> None:
    """Voxels that touch by an edge hold together, by a corner only they do not: 8 voxels on a stair, then one beside it."""
    signal = np.full((16, 16, 16), -1.0, np.float32)
    signal[0:8, 0, 0:5] = 1
    for k in range(8):
        signal[8 + k, 1 + k, 2] = 1
    assert np.array_equal(remove_floaters(signal, min_fraction=0.5), signal)
    assert voxels_to_mesh(signal).body_count == 1
    signal[14, 7, 3] = -1
    signal[13, 8, 3] = 1  # touches (14, 7, 2) by a corner
    assert remove_floaters(signal, min_fraction=0.5)[13, 8, 3] == -1


@pytest.mark.parametrize("suffix", MESH_SUFFIXES)
def test_written_and_read_back(tmp_path, suffix: str) -> None:
    mesh = voxels_to_mesh(ball(16, 0.4))
    write_mesh(mesh, tmp_path / f"a{suffix}")
    back = trimesh.load(tmp_path / f"a{suffix}", force="mesh")
    assert back.is_watertight
    assert len(back.faces) == len(mesh.faces)
    scale = 1000 if suffix in (".stl", ".3mf") else 1  # millimetres
    assert back.volume == pytest.approx(mesh.volume * scale**3, rel=1e-4)  # text and float32 keep some 6 digits
    np.testing.assert_allclose(back.bounds, mesh.bounds * scale, atol=1e-6 * scale)
    assert [p.name for p in tmp_path.iterdir()] == [f"a{suffix}"]


def test_unknown_format_and_failed_write_leave_nothing(tmp_path) -> None:
    mesh = voxels_to_mesh(ball(8, 0.4))
    with pytest.raises(MeshError, match=r"cannot write \.fbx; use \.obj"):
        write_mesh(mesh, tmp_path / "a.fbx")
    with pytest.raises(AttributeError):
        write_mesh(None, tmp_path / "a.obj")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []
