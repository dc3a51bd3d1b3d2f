"""A grid as one row of bytes in a shard, and rows of bytes back as the signal that the network sees.

Occupancy: one bit a voxel, bit b of byte k is voxel 8k + b in Morton order, so one byte is one octree octet.
TSDF: one int8 a voxel, 127 times the value. The signal is positive inside: 2*occupancy - 1, or -tsdf.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Float32, Int8, UInt8

from shapediff.data.manifest import Field
from shapediff.grid.morton import dense_to_morton

Row = UInt8[np.ndarray, " bytes"] | Int8[np.ndarray, " bytes"]
Rows = UInt8[np.ndarray, "n bytes"] | Int8[np.ndarray, "n bytes"]

ROW_DTYPES: dict[str, np.dtype] = {"occupancy": np.dtype(np.uint8), "tsdf": np.dtype(np.int8)}
_TSDF_LEVELS = 127

# (256, 8) float32: the eight signals of each byte, lowest bit first.
_OCTETS = (
    2.0 * np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little").astype(np.float32) - 1.0
)

_NUM_BITS = (_OCTETS > 0).sum(1).astype(np.uint8)


def row_length(resolution: int, field: Field) -> int:
    """Bytes in the row of one shape."""
    return resolution**3 // 8 if field == "occupancy" else resolution**3


def pack_grid(grid: Bool[np.ndarray, "r r r"] | Float[np.ndarray, "r r r"], *, field: Field) -> Row:
    """The row of a dense (x, y, z) grid, R a power of two: bool occupancy, or a TSDF in [-1, 1], negative
    inside.

    A TSDF is rounded to 1/127, except that one in (-1/254, 0) becomes -1/127: what is inside stays inside.
    """
    flat = dense_to_morton(grid)
    if field == "occupancy":
        return np.packbits(flat, bitorder="little")
    levels = np.rint(_TSDF_LEVELS * np.clip(flat, -1.0, 1.0)).astype(np.int8)
    return np.where(flat < 0, np.minimum(levels, np.int8(-1)), levels)


def unpack_signal(rows: Rows, *, field: Field, num_halvings: int = 0) -> Float32[np.ndarray, "n voxels"]:
    """The signals of the rows at R / 2^num_halvings voxels a side, in Morton order, positive inside.

    A coarser voxel is occupied if any child is (the maximum: thin legs survive); a coarser TSDF is the mean.
    """
    if field == "occupancy":
        return _unpack_octets(rows) if num_halvings == 0 else _pool_octets(rows, num_halvings)
    signal = rows.astype(np.float32) * np.float32(-1.0 / _TSDF_LEVELS)
    return signal if num_halvings == 0 else signal.reshape(len(rows), -1, 8**num_halvings).mean(-1)


def fill_fraction(rows: Rows, *, field: Field) -> Float[np.ndarray, " n"]:
    """The part of the voxels of each row that is inside, in [0, 1]."""
    if field == "occupancy":
        return _NUM_BITS[rows].sum(1, dtype=np.int64) / (8 * rows.shape[1])
    return (rows < 0).mean(1)


def _unpack_octets(rows: UInt8[np.ndarray, "n bytes"]) -> Float32[np.ndarray, "n voxels"]:
    return np.take(_OCTETS, rows, axis=0, mode="clip").reshape(len(rows), -1)


def _pool_octets(rows: UInt8[np.ndarray, "n bytes"], num_halvings: int) -> Float32[np.ndarray, "n voxels"]:
    # Any of 8 bits is "the byte is not 0"; any of 8 bytes is "the 64-bit word is not 0".
    words = np.ascontiguousarray(rows).view(np.uint64) if num_halvings > 1 else rows
    occupied = words != 0
    if num_halvings > 2:
        occupied = occupied.reshape(len(rows), -1, 8 ** (num_halvings - 2)).any(-1)
    return 2.0 * occupied.astype(np.float32) - 1.0
