"""Procedural shapes: clean solids, the same for the same seed, of every style they promise, whole at 32^3."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import label

from shapediff.data.shapes import (
    CLASSES,
    MADE_WITH,
    airplane,
    bottle,
    chair,
    lamp,
    make_shape,
    mug,
    table,
    write_meshes,
)
from shapediff.data.shapes.parts import plate, turned
from shapediff.data.sources import find_meshes
from shapediff.errors import ConfigError
from shapediff.geometry.voxelize import voxelize

SEEDS = range(12)


@pytest.mark.parametrize("name", CLASSES)
def test_clean_solids_that_are_whole_at_32(name: str) -> None:
    volumes = set()
    for seed in SEEDS:
        shape = make_shape(name, seed=seed)
        mesh = shape.mesh
        assert mesh.is_watertight
        assert mesh.is_winding_consistent
        assert mesh.volume > 0
        _, counts = np.unique(mesh.edges_sorted, axis=0, return_counts=True)
        assert (counts == 2).all()
        np.testing.assert_allclose(mesh.bounds[0, 1], 0, atol=1e-6)
        np.testing.assert_allclose(mesh.bounds.mean(0)[[0, 2]], 0, atol=1e-6)
        occupancy = voxelize(mesh, resolution=32)
        # Touching by edges counts: a leaning leg of little more than a voxel goes up in steps.
        assert label(occupancy, np.ones((3, 3, 3)))[1] == 1, f"seed {seed}: {shape.caption}"
        volumes.add(round(mesh.volume, 9))
    assert len(volumes) == len(SEEDS)


@pytest.mark.parametrize("name", CLASSES)
def test_the_same_seed_is_the_same_mesh(name: str) -> None:
    first, second = make_shape(name, seed=7), make_shape(name, seed=7)
    assert first.caption == second.caption
    assert np.array_equal(first.mesh.vertices, second.mesh.vertices)
    assert np.array_equal(first.mesh.faces, second.mesh.faces)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "chair",
            [*(f"a {back} back" for back in chair.BACKS), *chair.BASES, "two arms", "a cushion", "bar chair", "lounge"],
        ),
        ("table", [*table.TOPS, *table.BASES, "lower shelf"]),
        (
            "lamp",
            [
                *(f"{shade} shade" for shade in lamp.SHADES),
                "arc lamp",
                "desk lamp",
                "tripod",
                "floor lamp",
                "table lamp",
            ],
        ),
        ("mug", [*mug.BODIES, *mug.HANDLES, "saucer"]),
        ("bottle", [*bottle.KINDS, "without a cap"]),
        ("airplane", [*airplane.KINDS, *airplane.TAILS, "four engines"]),
    ],
)
def test_every_style_is_built_and_said(name: str, words: list[str]) -> None:
    captions = [make_shape(name, seed=seed).caption for seed in range(150)]
    for word in words:
        assert any(word in caption for caption in captions), word


def test_fronts_and_symmetry() -> None:
    for seed in range(6):
        mesh = make_shape("chair", seed=seed).mesh
        top = mesh.vertices[mesh.vertices[:, 1] > 0.9 * mesh.bounds[1, 1]]
        assert top[:, 2].mean() < 0  # the back of a chair is behind
        for name in ("chair", "car", "sofa"):
            mesh = make_shape(name, seed=seed).mesh
            if name == "sofa" and "chaise" in make_shape(name, seed=seed).caption:
                continue
            if "star base" in make_shape(name, seed=seed).caption:
                continue
            assert abs(mesh.center_mass[0]) < 0.01 * mesh.extents[0]


def test_parts_have_their_closed_forms() -> None:
    for normal in "xyz":
        assert plate([(0, 0), (3, 0), (0, 2)], 0.5, normal=normal).volume() == pytest.approx(1.5)
    frustum = turned([(2.0, 0.0), (1.0, 3.0)], segments=256)
    # A polygon of 256 sides has 1e-4 less area than its circle.
    assert frustum.volume() == pytest.approx(np.pi * 3 / 3 * (4 + 2 + 1), rel=2e-4)


def test_files_depend_on_the_seed_alone_and_are_resumed(tmp_path: Path) -> None:
    def hashes(folder: Path) -> dict[str, str]:
        return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.glob("*/*.*")}

    classes = ("mug", "stool")
    assert write_meshes(tmp_path / "a", classes=classes, per_class=3, seed=1) == 6
    write_meshes(tmp_path / "b", classes=classes, per_class=2, seed=1, workers=2)
    few, all_ = hashes(tmp_path / "b"), hashes(tmp_path / "a")
    assert len(all_) == 12
    assert few == {name: all_[name] for name in few}
    (tmp_path / "b" / "mug" / "mug_00000.obj").unlink()
    assert write_meshes(tmp_path / "b", classes=classes, per_class=3, seed=1) == 3
    assert hashes(tmp_path / "b") == all_
    assert write_meshes(tmp_path / "b", classes=classes, per_class=3, seed=1) == 0
    write_meshes(tmp_path / "c", classes=classes, per_class=1, seed=2)
    assert hashes(tmp_path / "c")["mug/mug_00000.obj"] != all_["mug/mug_00000.obj"]


def test_a_folder_made_with_another_seed_or_format_is_not_mixed(tmp_path: Path) -> None:
    write_meshes(tmp_path, classes=["mug"], per_class=1, seed=1)
    for settings, message in (
        ({"seed": 2}, "made with seed 1, not 2;"),
        ({"seed": 1, "format": "ply"}, "made with format obj, not ply;"),
        ({"seed": 2, "format": "ply"}, "made with seed 1, not 2 and format obj, not ply;"),
    ):
        with pytest.raises(ConfigError, match=message):
            write_meshes(tmp_path, classes=["mug", "stool"], per_class=2, **settings)  # type: ignore[arg-type]
    assert len(list(tmp_path.rglob("*.[op][bl][jy]"))) == 1
    assert {source.name for source in find_meshes(tmp_path)} == {"mug/mug_00000.obj"}
    (tmp_path / MADE_WITH).write_text("{}")
    with pytest.raises(ConfigError, match="does not say what"):
        write_meshes(tmp_path, classes=["mug"], per_class=1, seed=1)
    (tmp_path / MADE_WITH).unlink()  # a folder of an earlier version
    assert write_meshes(tmp_path, classes=["mug"], per_class=2, seed=2) == 1
    assert not (tmp_path / MADE_WITH).exists()


def test_unknown_names_say_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="class 'chiar' is unknown; did you mean 'chair'"):
        write_meshes(tmp_path, classes=["chiar"], per_class=1)
    with pytest.raises(ConfigError, match="There are: airplane, bed"):
        make_shape("dragon", seed=0)
    with pytest.raises(ConfigError, match="format 'fbx'"):
        write_meshes(tmp_path, per_class=1, format="fbx")
    with pytest.raises(ConfigError, match="at least 1"):
        write_meshes(tmp_path, per_class=0)
