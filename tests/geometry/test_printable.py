"""Meshes that print: closed, manifold, apart from themselves, of the size, parts and hollows asked for, whatever the grid."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import manifold3d
import numpy as np
import pytest
import trimesh
from scipy.ndimage import generate_binary_structure, label

from shapediff.errors import ConfigError, MeshError
from shapediff.geometry.blocks import GAP, block_surface
from shapediff.geometry.export import write_mesh
from shapediff.geometry.isosurface import voxels_to_mesh
from shapediff.geometry.mesh import load_mesh
from shapediff.geometry.printable import MeshOptions, length_text, parse_length, printable_mesh, solid_voxels
from shapediff.geometry.report import check_mesh, check_surface
from tests.geometry.random_fields import KINDS, random_field
from tests.geometry.test_isosurface import ball

EVERYTHING = MeshOptions(min_part=0, keep_cavities=True)


def assert_closed_for_others(mesh: trimesh.Trimesh) -> None:
    """By trimesh and by open3d, after vertices at the same place were made one, as readers of files do."""
    import open3d as o3d

    merged = trimesh.Trimesh(mesh.vertices, mesh.faces, process=True)
    assert len(merged.faces) == len(mesh.faces)
    assert merged.is_watertight and merged.is_winding_consistent and merged.volume > 0
    other = o3d.geometry.TriangleMesh(
        o3d.utility.Vector3dVector(merged.vertices), o3d.utility.Vector3iVector(merged.faces)
    )
    assert other.is_edge_manifold(allow_boundary_edges=False) and other.is_vertex_manifold() and other.is_orientable()


@pytest.mark.parametrize("surface", ["smooth", "blocks"])
@pytest.mark.parametrize("kind", KINDS)
def test_two_hundred_random_fields_print(kind: str, surface: str) -> None:
    """Parts and hollows are those of the grid: inside voxels hold together by faces and edges, outside ones by faces."""
    options = dataclasses.replace(EVERYTHING, surface=surface)
    for seed in range(34):
        field = random_field(kind, seed, resolution=7)
        mesh = printable_mesh(field, options)
        assert_closed_for_others(mesh)
        report = check_mesh(mesh)
        assert report.is_printable, (seed, report)
        assert report.parts == label(field > 0, generate_binary_structure(3, 2))[1], seed
        assert report.cavities == label(np.pad(field <= 0, 1, constant_values=True))[1] - 1, seed


@pytest.mark.parametrize("surface", ["smooth", "blocks"])
def test_few_faces_stay_closed(surface: str) -> None:
    for kind in KINDS:
        field = random_field(kind, 0, resolution=6)
        for max_faces in (20, 300):
            options = MeshOptions(surface=surface, max_faces=max_faces, min_part=0)
            report = check_mesh(printable_mesh(field, options))
            assert report.is_printable, (kind, report)


def test_all_ways_to_fill_eight_voxels_as_blocks() -> None:
    """Volume and area are those of the voxels but for the necks and gaps where they meet by edges and corners."""
    for code in range(1, 256):
        inside = np.array([code >> k & 1 for k in range(8)], bool).reshape(2, 2, 2)
        vertices, faces = block_surface(inside)
        report = check_surface(vertices, faces)
        assert report.is_printable, code
        padded = np.pad(inside, 1)
        exposed = sum(int((np.diff(padded.astype(int), axis=axis) != 0).sum()) for axis in range(3))
        if (vertices == vertices.round()).all():
            assert report.volume == pytest.approx(inside.sum())
            assert report.area == pytest.approx(exposed)
        else:
            assert report.volume == pytest.approx(inside.sum(), abs=6 * GAP)


def test_flat_blocks_have_few_faces() -> None:
    box = np.full((16, 16, 16), -1.0, np.float32)
    box[2:14, 3:13, 4:12] = 1
    mesh = printable_mesh(box, MeshOptions(surface="blocks"))
    assert len(mesh.faces) == 12
    assert mesh.volume == pytest.approx(12 * 10 * 8 / 16**3)
    np.testing.assert_allclose(mesh.bounds, np.array([[2, 3, 4], [14, 13, 12]]) / 16 - 0.5)


def table(slant: float, width: int) -> np.ndarray:
    """A table on one leg at y < 24, `width` voxels wide, that leans towards +x by `slant` voxels a voxel."""
    signal = np.full((32, 32, 32), -1.0, np.float32)
    for y in range(24):
        signal[(x := 4 + int(slant * y)) : x + width, y, 12 : 12 + width] = 1
    signal[4:28, 24:27, 4:28] = 1
    return signal


def leg_volume(mesh: trimesh.Trimesh) -> float:
    """Of the part between a quarter and a half of the height of the leg."""
    body = manifold3d.Manifold(manifold3d.Mesh64(np.array(mesh.vertices, np.float64), np.array(mesh.faces, np.uint64)))
    low, high = 6 / 32 - 0.5, 16 / 32 - 0.5
    return body.trim_by_plane([0, 1, 0], low).trim_by_plane([0, -1, 0], -high).volume()


@pytest.mark.parametrize("slant", [0.0, 0.5, 0.9])
@pytest.mark.parametrize("width", [1, 2])
def test_smoothing_keeps_thin_legs(slant: float, width: int) -> None:
    """Taubin alone leaves 29 to 36 % of the cross-section of legs one voxel wide, so 10 % tells the two apart."""
    signal = table(slant, width)
    plain, smooth = voxels_to_mesh(signal, smooth=0), voxels_to_mesh(signal)
    assert check_mesh(smooth).is_printable
    assert smooth.body_count == 1
    assert leg_volume(smooth) == pytest.approx(leg_volume(plain), rel=0.1)
    assert smooth.volume == pytest.approx(plain.volume, rel=0.02)
    assert smooth.bounds[0, 1] == pytest.approx(-0.5, abs=1 / 32)


def test_smoothing_takes_the_steps_off_a_ball() -> None:
    """Normals of faces come nearer to the radius, to less than half of the angle, and the volume stays."""
    inside = np.where(ball(32, 0.4) > 0, 1.0, -1.0)
    steps, smooth = voxels_to_mesh(inside, smooth=0), voxels_to_mesh(inside)
    before, after = (
        np.arccos(np.einsum("fi,fi->f", mesh.face_normals, trimesh.unitize(mesh.triangles_center))).mean()
        for mesh in (steps, smooth)
    )
    assert after < before / 2
    assert smooth.volume == pytest.approx(steps.volume, rel=0.005)


@pytest.mark.parametrize("surface", ["smooth", "blocks"])
def test_cavities_are_filled_or_kept(surface: str) -> None:
    """A box of 10^3 with a hollow of 6^3 in which a box of 2^3 floats."""
    signal = np.full((16, 16, 16), -1.0, np.float32)
    signal[3:13, 3:13, 3:13] = 1
    signal[5:11, 5:11, 5:11] = -1
    signal[7:9, 7:9, 7:9] = 1
    options = MeshOptions(surface=surface, smoothing=0)
    assert solid_voxels(signal, options).sum() == 1000
    filled = check_mesh(printable_mesh(signal, options))
    assert (filled.parts, filled.cavities) == (1, 0)
    kept = check_mesh(printable_mesh(signal, dataclasses.replace(options, keep_cavities=True)))
    assert (kept.parts, kept.cavities) == (1, 1)  # what floats is below 5 % of the rest
    whole = check_mesh(printable_mesh(signal, dataclasses.replace(options, keep_cavities=True, min_part=0)))
    assert (whole.parts, whole.cavities) == (2, 1)
    if surface == "blocks":
        assert np.array([filled.volume, kept.volume, whole.volume]) * 16**3 == pytest.approx([1000, 784, 792])


def test_a_hollow_with_a_hole_is_none() -> None:
    signal = np.full((8, 8, 8), 1.0, np.float32)
    signal[2:6, 2:6, 2:6] = -1
    signal[3, 3, :2] = -1
    assert (solid_voxels(signal, MeshOptions()) == (signal > 0)).all()


def test_height_and_up() -> None:
    signal = table(0.5, 2)
    plain = printable_mesh(signal)
    mesh = printable_mesh(signal, MeshOptions(height=0.9))
    assert mesh.extents[1] == pytest.approx(0.9)
    np.testing.assert_allclose(mesh.extents, plain.extents * 0.9 / plain.extents[1])
    np.testing.assert_allclose([mesh.bounds[0, 1], *mesh.bounds.mean(0)[[0, 2]]], 0, atol=1e-12)
    turned = printable_mesh(signal, MeshOptions(height=0.9, up="z"))
    assert turned.extents[2] == pytest.approx(0.9)
    assert turned.volume == pytest.approx(mesh.volume)
    assert turned.bounds[0, 2] == pytest.approx(0)


def test_load_mesh_turns_z_up_back(tmp_path: Path) -> None:
    options = MeshOptions(height=0.5)
    write_mesh(printable_mesh(table(0.5, 2), dataclasses.replace(options, up="z")), tmp_path / "a.ply")
    back, there = load_mesh(tmp_path / "a.ply", up="z"), printable_mesh(table(0.5, 2), options)
    np.testing.assert_allclose(back.bounds, there.bounds, atol=1e-6)
    np.testing.assert_allclose(back.center_mass, there.center_mass, atol=1e-6)


def test_budget_of_faces_keeps_the_shape(caplog: pytest.LogCaptureFixture) -> None:
    """A quadric error of Garland and Heckbert at a fifth of the faces: volume within 2 %, every point within a voxel."""
    signal = table(0, 2)
    full, few = printable_mesh(signal), printable_mesh(signal, MeshOptions(max_faces=600))
    assert len(full.faces) > 3000
    assert len(few.faces) <= 600
    assert check_mesh(few).is_printable
    assert few.volume == pytest.approx(full.volume, rel=0.02)
    np.testing.assert_allclose(few.bounds, full.bounds, atol=1 / 32)
    assert not caplog.messages
    many_parts = random_field("touching", 0)
    printable_mesh(many_parts, MeshOptions(max_faces=20, min_part=0))
    assert "max_faces=20 is not met" in caplog.text


def test_empty_and_broken_grids_are_refused() -> None:
    for surface in ("smooth", "blocks"):
        with pytest.raises(MeshError, match="empty"):
            printable_mesh(np.full((4, 4, 4), -1.0), MeshOptions(surface=surface))  # type: ignore[arg-type]
        with pytest.raises(MeshError, match="not finite"):
            printable_mesh(np.full((4, 4, 4), np.nan), MeshOptions(surface=surface))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "metres"),
    [
        ("0.9m", 0.9),
        ("90cm", 0.9),
        (" 900 mm", 0.9),
        ("35in", 0.889),
        ("3FT", 0.9144),
        ("0.9", 0.9),
        (".5m", 0.5),
        ("2.m", 2),
    ],
)
def test_lengths(text: str, metres: float) -> None:
    assert parse_length(text) == pytest.approx(metres)


def test_lengths_are_said_in_the_unit_that_fits_and_read_back() -> None:
    said = ["1 mm", "9.99 mm", "1 cm", "12 cm", "1 m", "1.2 m", "12 m", "1e+03 m"]
    for metres, text in zip([0.001, 0.00999, 0.01, 0.12, 0.99999, 1.2, 12, 1000], said, strict=True):
        assert length_text(metres) == text
        if "e" not in text:
            assert parse_length(text) == pytest.approx(metres, rel=1e-4)


@pytest.mark.parametrize("text", ["", "m", "-1m", "1 yard", "1e3m", "nan", "inf", "1,5m", "0x1m"])
def test_no_lengths(text: str) -> None:
    with pytest.raises(ConfigError, match="is no length"):
        parse_length(text)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"surface": "cubes"}, "surface='cubes' is unknown; use one of smooth, blocks"),
        ({"up": "x"}, "up='x'"),
        ({"smoothing": -1}, "smoothing=-1"),
        ({"max_faces": 3}, "max_faces=3 must be at least 20"),
        ({"height": 0.0}, "height=0.0 m"),
        ({"height": float("nan")}, "height=nan"),
        ({"min_part": 1.5}, "min_part=1.5"),
    ],
)
def test_options_out_of_range(setting: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        MeshOptions(**setting)
