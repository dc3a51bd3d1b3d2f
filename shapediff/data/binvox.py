"""Reading .binvox files (Patrick Min's format, version 1): a text header, then run lengths of 0 and 1."""

from __future__ import annotations

from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Bool

from shapediff.errors import DataError

_MAX_DIMENSION = 1024
_MAX_HEADER_LINES = 16
_MAX_LINE = 256


def read_binvox(path: Path) -> Bool[np.ndarray, "x y z"]:
    """The grid of a .binvox file, index order (x, y, z). Raises DataError saying what is wrong with it."""
    with path.open("rb") as stream:
        depth, height, width = _read_header(stream)
        runs = stream.read(2 * depth * height * width + 1)
    # The file's order is x slowest, then z, y fastest (binvox: index = x*width*height + z*width + y).
    return _decode(runs, depth * height * width).reshape(depth, height, width).transpose(0, 2, 1)


def binvox_shape(path: Path) -> tuple[int, int, int]:
    """The (x, y, z) size that the header declares. Raises DataError if the header is wrong."""
    with path.open("rb") as stream:
        depth, height, width = _read_header(stream)
    return depth, width, height


def _read_header(stream: IO[bytes]) -> tuple[int, int, int]:
    if not stream.readline(_MAX_LINE).startswith(b"#binvox 1"):
        raise DataError("it does not begin with '#binvox 1'; it is no binvox file of version 1")
    dimensions: list[int] = []
    for _ in range(_MAX_HEADER_LINES):
        words = stream.readline(_MAX_LINE).split()
        if words[:1] == [b"dim"]:
            dimensions = _dimensions(words[1:])
        elif words[:1] == [b"data"]:
            if not dimensions:
                raise DataError("its header has no 'dim' line before 'data'")
            return dimensions[0], dimensions[1], dimensions[2]
        elif words[:1] not in ([b"translate"], [b"scale"]):
            raise DataError(f"its header has an unknown line that begins {b' '.join(words)[:40]!r}")
    raise DataError("its header has no 'data' line")


def _dimensions(words: list[bytes]) -> list[int]:
    if len(words) != 3 or not all(map(_is_dimension, words)):
        raise DataError(f"its 'dim' line is {b' '.join(words)[:40]!r}; expected three sizes from 1 to {_MAX_DIMENSION}")
    return [int(word) for word in words]


def _is_dimension(word: bytes) -> bool:
    return word.isdigit() and len(word) <= len(str(_MAX_DIMENSION)) and 1 <= int(word) <= _MAX_DIMENSION


def _decode(runs: bytes, num_voxels: int) -> Bool[np.ndarray, " voxels"]:
    if len(runs) % 2 or len(runs) > 2 * num_voxels:
        raise DataError(f"its run lengths are {len(runs)} bytes; expected an even number up to {2 * num_voxels}")
    pairs = np.frombuffer(runs, dtype=np.uint8).reshape(-1, 2)
    values, lengths = pairs[:, 0], pairs[:, 1].astype(np.int64)
    if values.size and values.max() > 1:
        raise DataError(f"it holds the value {values.max()}; a binvox voxel is 0 or 1")
    if int(lengths.sum()) != num_voxels:
        raise DataError(f"its runs add up to {int(lengths.sum())} voxels of {num_voxels} declared; is it cut off?")
    return np.repeat(values.astype(bool), lengths)
