"""Files of voxels, read back by readers that share nothing with the writers: trimesh's, and two made here of the formats."""

from __future__ import annotations

import gzip
import io
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trimesh

from shapediff.data.grid_files import open_grid_file
from shapediff.errors import MeshError
from shapediff.geometry.voxel_files import VOXEL_SUFFIXES, write_voxels


def grids() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    corner = np.zeros((8, 8, 8), bool)
    corner[1, 2, 3] = True
    return {
        "one voxel": corner,
        "noise": rng.random((12, 12, 12)) < 0.4,
        "long runs": np.pad(np.ones((20, 20, 20), bool), 6),
        "runs of 255": (np.arange(16**3) % 510 < 255).reshape(16, 16, 16),
        "full": np.ones((8, 8, 8), bool),
    }


@pytest.mark.parametrize("name", grids())
def test_binvox_by_trimesh_and_by_our_reader(tmp_path: Path, name: str) -> None:
    grid = grids()[name]
    write_voxels(grid, tmp_path / "a.binvox")
    back = trimesh.load(tmp_path / "a.binvox")
    assert np.array_equal(back.matrix, grid)
    np.testing.assert_allclose(back.bounds.mean(0), _centre(grid), atol=1 / len(grid))
    assert np.array_equal(open_grid_file(tmp_path / "a.binvox").read()(0), grid)


def _centre(grid: np.ndarray) -> np.ndarray:
    """Of the bounding box of what is inside, in the unit cube."""
    inside = np.argwhere(grid)
    return (inside.min(0) + inside.max(0) + 1) / 2 / len(grid) - 0.5


@pytest.mark.parametrize("name", grids())
def test_npz_is_what_imports_read(tmp_path: Path, name: str) -> None:
    write_voxels(grids()[name], tmp_path / "a.npz")
    assert np.array_equal(open_grid_file(tmp_path / "a.npz").read()(0), grids()[name])


def read_vox(content: bytes) -> tuple[tuple[int, int, int], dict[tuple[int, int, int], int]]:
    """Size and colour of each voxel of a MagicaVoxel file of one model: MAIN holds chunks, each (id, content, children)."""
    magic, version = struct.unpack_from("<4si", content)
    assert (magic, version) == (b"VOX ", 150)
    name, own, children = struct.unpack_from("<4sii", content, 8)
    assert (name, own, children) == (b"MAIN", 0, len(content) - 20)
    chunks, at = {}, 20
    while at < len(content):
        name, own, children = struct.unpack_from("<4sii", content, at)
        chunks[name] = content[at + 12 : at + 12 + own]
        at += 12 + own + children
    (num,) = struct.unpack_from("<i", chunks[b"XYZI"])
    rows = list(struct.iter_unpack("<4B", chunks[b"XYZI"][4:]))
    assert len(rows) == num
    return struct.unpack("<3i", chunks[b"SIZE"]), {(x, y, z): colour for x, y, z, colour in rows}  # type: ignore[return-value]


@pytest.mark.parametrize("name", grids())
def test_vox_by_a_reader_of_the_format(tmp_path: Path, name: str) -> None:
    """z is up there and y points away: (x, y, z) of ours is (x, R - 1 - z, y)."""
    grid = grids()[name]
    write_voxels(grid, tmp_path / "a.vox")
    size, voxels = read_vox((tmp_path / "a.vox").read_bytes())
    assert size == grid.shape
    assert set(voxels) == {(x, len(grid) - 1 - z, y) for x, y, z in np.argwhere(grid).tolist()}
    assert set(voxels.values()) == {1}


def read_nbt(stream: io.BytesIO, tag: int) -> Any:
    """A value of Minecraft's named binary tags, all numbers big-endian."""

    def number(code: str) -> int:
        return struct.unpack(">" + code, stream.read(struct.calcsize(code)))[0]

    if tag in (1, 2, 3, 4):
        return number("bhiq"[tag - 1])
    if tag == 7:
        return stream.read(number("i"))
    if tag == 10:
        values = {}
        while kind := number("b"):
            name = stream.read(number("H")).decode("utf-8")
            values[name] = read_nbt(stream, kind)
        return values
    raise AssertionError(f"tag {tag}")


@pytest.mark.parametrize("name", grids())
def test_schem_by_a_reader_of_the_format(tmp_path: Path, name: str) -> None:
    """Sponge schematic 2: BlockData[x + z * Width + y * Width * Length] is an index of the palette."""
    grid = grids()[name]
    write_voxels(grid, tmp_path / "a.schem")
    stream = io.BytesIO(gzip.decompress((tmp_path / "a.schem").read_bytes()))
    assert stream.read(12) == b"\x0a\x00\x09Schematic"
    schematic = read_nbt(stream, 10)
    assert stream.read() == b""
    width, height, length = (schematic[key] for key in ("Width", "Height", "Length"))
    assert (width, height, length) == grid.shape
    assert schematic["Version"] == 2 and schematic["DataVersion"] > 1343
    assert len(schematic["Palette"]) == schematic["PaletteMax"]
    air, data = schematic["Palette"]["minecraft:air"], schematic["BlockData"]
    solid = {
        (x, y, z)
        for x in range(width)
        for y in range(height)
        for z in range(length)
        if data[x + z * width + y * width * length] != air
    }
    assert solid == set(map(tuple, np.argwhere(grid).tolist()))


def test_refusals_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(MeshError, match=r"cannot write \.ovm; use \.npz"):
        write_voxels(np.ones((2, 2, 2), bool), tmp_path / "a.ovm")
    with pytest.raises(MeshError, match="at most 256 voxels a side, not 257"):
        write_voxels(np.ones((257, 1, 1), bool), tmp_path / "a.vox")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", VOXEL_SUFFIXES)
def test_the_same_grid_is_the_same_file(tmp_path: Path, suffix: str) -> None:
    for name in ("a", "b"):
        write_voxels(grids()["noise"], tmp_path / f"{name}{suffix}")
    assert (tmp_path / f"a{suffix}").read_bytes() == (tmp_path / f"b{suffix}").read_bytes()
