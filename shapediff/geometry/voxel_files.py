"""Writing voxels: .npz, .binvox, MagicaVoxel .vox and Minecraft .schem (Sponge schematic, version 2)."""

from __future__ import annotations

import gzip
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
from jaxtyping import Bool

from shapediff.errors import MeshError
from shapediff.files import replaced_file

Grid = Bool[np.ndarray, "r r r"]

BLOCK = "minecraft:quartz_block"
DATA_VERSION = 2975
"""Minecraft 1.18.2, the first long-lived one of those whose names of blocks are today's."""

MAX_VOX_SIDE = 256


def write_voxels(inside: Grid, path: str | Path) -> None:
    """Write a grid, index order (x, y, z), y up, as its suffix says, beside its place first, then at once.

    .npz has one array `voxels`, bool; .binvox places it in the unit cube around 0; .vox is z up, as MagicaVoxel is, with the
    front towards the viewer; .schem has the cells outside as air. Raises MeshError for another suffix, or a .vox of more than
    256 voxels a side.
    """
    path = Path(path)
    write = _WRITERS.get(path.suffix.lower())
    if write is None:
        raise MeshError(
            f"{path.name}: cannot write {path.suffix or 'a file without suffix'}; use {', '.join(VOXEL_SUFFIXES)}"
        )
    with replaced_file(path) as partial:
        write(np.asarray(inside, bool), partial)


def _write_npz(inside: Grid, path: Path) -> None:
    np.savez_compressed(path, voxels=inside)


def _write_binvox(inside: Grid, path: Path) -> None:
    """Run lengths of at most 255; x slowest, then z, y fastest (Patrick Min's format, version 1)."""
    header = f"#binvox 1\ndim {' '.join(map(str, inside.shape))}\ntranslate -0.5 -0.5 -0.5\nscale 1\ndata\n"
    flat = inside.transpose(0, 2, 1).ravel()
    starts = np.r_[0, np.flatnonzero(flat[1:] != flat[:-1]) + 1]
    lengths = np.diff(np.r_[starts, len(flat)])
    pieces = -(-lengths // 255)
    runs = np.full(pieces.sum(), 255)
    runs[np.cumsum(pieces) - 1] = lengths - 255 * (pieces - 1)
    pairs = np.stack([np.repeat(flat[starts], pieces), runs], axis=1).astype(np.uint8)
    path.write_bytes(header.encode("ascii") + pairs.tobytes())


def _write_vox(inside: Grid, path: Path) -> None:
    """One model in chunks SIZE and XYZI, colour 1 of the default palette (MagicaVoxel's format, version 150)."""
    if max(inside.shape) > MAX_VOX_SIDE:
        raise MeshError(f"a .vox holds at most {MAX_VOX_SIDE} voxels a side, not {max(inside.shape)}; use .schem")
    turned = inside[:, :, ::-1].transpose(0, 2, 1)
    voxels = np.argwhere(turned)
    rows = np.concatenate([voxels, np.ones((len(voxels), 1), int)], axis=1).astype(np.uint8)
    chunks = _chunk(b"SIZE", struct.pack("<3i", *turned.shape))
    chunks += _chunk(b"XYZI", struct.pack("<i", len(rows)) + rows.tobytes())
    path.write_bytes(b"VOX " + struct.pack("<i", 150) + b"MAIN" + struct.pack("<2i", 0, len(chunks)) + chunks)


def _chunk(name: bytes, content: bytes) -> bytes:
    return name + struct.pack("<2i", len(content), 0) + content


def _write_schem(inside: Grid, path: Path) -> None:
    """Gzipped NBT; BlockData is y slowest, then z, x fastest, an index of the palette each, below 128 and so one byte."""
    width, height, length = inside.shape
    palette = _named(3, "minecraft:air", struct.pack(">i", 0)) + _named(3, BLOCK, struct.pack(">i", 1))
    blocks = inside.transpose(1, 2, 0).astype(np.uint8).tobytes()
    content = (
        _named(3, "Version", struct.pack(">i", 2))
        + _named(3, "DataVersion", struct.pack(">i", DATA_VERSION))
        + _named(2, "Width", struct.pack(">H", width))
        + _named(2, "Height", struct.pack(">H", height))
        + _named(2, "Length", struct.pack(">H", length))
        + _named(3, "PaletteMax", struct.pack(">i", 2))
        + _named(10, "Palette", palette + b"\0")
        + _named(7, "BlockData", struct.pack(">i", len(blocks)) + blocks)
    )
    path.write_bytes(gzip.compress(_named(10, "Schematic", content + b"\0"), mtime=0))


def _named(tag: int, name: str, payload: bytes) -> bytes:
    """An NBT tag: its type, its name, its value; numbers are big-endian."""
    encoded = name.encode("utf-8")
    return struct.pack(">BH", tag, len(encoded)) + encoded + payload


_WRITERS: dict[str, Callable[[Grid, Path], None]] = {
    ".npz": _write_npz,
    ".binvox": _write_binvox,
    ".vox": _write_vox,
    ".schem": _write_schem,
}
VOXEL_SUFFIXES = tuple(_WRITERS)
