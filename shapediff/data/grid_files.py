"""Files of voxel grids: .npz, .npy and .binvox, read without pickle and within limits."""

from __future__ import annotations

import math
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from jaxtyping import Bool

from shapediff.data.binvox import binvox_shape, read_binvox
from shapediff.data.manifest import MAX_RESOLUTION
from shapediff.errors import DataError

MAX_FILE_BYTES = 8 << 30
PACKED_KEY = "packed"

Grid = Bool[np.ndarray, "x y z"]

# What reading a damaged file can raise; DataError is a ValueError, NotImplementedError a RuntimeError.
READ_ERRORS = (
    OSError,
    ValueError,
    KeyError,
    EOFError,
    RuntimeError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class GridFile:
    """`num` grids of one `shape` (x, y, z); `read()` gives a function from a number in [0, num) to a bool
    grid.

    `is_batch` tells a file made for many grids, even if it holds one, from a file of one.
    """

    num: int
    shape: tuple[int, int, int]
    is_batch: bool
    read: Callable[[], Callable[[int], Grid]]


def open_grid_file(path: Path, *, key: str | None = None, threshold: float | None = 0.5) -> GridFile:
    """Read the headers of a grid file, not yet its grids.

    An .npy holds (x, y, z) or (n, x, y, z) or (n, 1, x, y, z); an .npz holds one such array, or the one
    called `key`, or `packed`: (n, R^3/8) uint8, the bits of each flattened (x, y, z) grid as `numpy.packbits`
    writes them. A voxel is inside where a bool or integer is above 0, or a float above `threshold`; None: above 0 in an array
    that goes below it, a signal, else above 0.5. Raises DataError saying what is wrong.
    """
    try:
        if path.stat().st_size > MAX_FILE_BYTES:
            raise DataError(f"it is larger than {MAX_FILE_BYTES >> 30} GiB; split it")
        file = _OPENERS[path.suffix.lower()](path, key, threshold)
        if file.num == 0:
            raise DataError("it holds no grid")
        return file
    except READ_ERRORS as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"it cannot be read ({error}); is it damaged?") from error


def _open_binvox(path: Path, key: str | None, threshold: float | None) -> GridFile:
    return GridFile(num=1, shape=binvox_shape(path), is_batch=False, read=lambda: lambda _: read_binvox(path))


def _open_npy(path: Path, key: str | None, threshold: float | None) -> GridFile:
    with path.open("rb") as stream:
        shape, dtype = _npy_header(stream, path.stat().st_size)
    _require_numbers(dtype)
    return _dense(shape, dtype, threshold, lambda: np.load(path, mmap_mode="r", allow_pickle=False))


def _open_npz(path: Path, key: str | None, threshold: float | None) -> GridFile:
    headers = _npz_headers(path)
    name = _choose(headers, key)
    shape, dtype = headers[name]
    _require_numbers(dtype)

    def load() -> np.ndarray:
        with np.load(path, allow_pickle=False) as archive:
            return archive[name]

    if name == PACKED_KEY and len(shape) == 2:
        return _packed(shape, dtype, load)
    return _dense(shape, dtype, threshold, load)


_OPENERS: dict[str, Callable[[Path, str | None, float | None], GridFile]] = {
    ".npz": _open_npz,
    ".npy": _open_npy,
    ".binvox": _open_binvox,
}
GRID_SUFFIXES = tuple(_OPENERS)


def _packed(shape: tuple[int, ...], dtype: np.dtype, load: Callable[[], np.ndarray]) -> GridFile:
    resolution = round((8 * shape[1]) ** (1 / 3))
    if dtype != np.uint8 or resolution**3 != 8 * shape[1]:
        raise DataError(f"its {PACKED_KEY!r} is {dtype} {shape}; expected uint8 (n, R^3 / 8)")
    side = (resolution,) * 3

    def read() -> Callable[[int], Grid]:
        rows = load()
        return lambda i: np.unpackbits(rows[i]).reshape(side).astype(bool)

    return GridFile(num=shape[0], shape=_checked_side(side), is_batch=True, read=read)


def _dense(
    shape: tuple[int, ...], dtype: np.dtype, threshold: float | None, load: Callable[[], np.ndarray]
) -> GridFile:
    if len(shape) not in (3, 4, 5) or (len(shape) == 5 and shape[1] != 1):
        raise DataError(f"its array has shape {shape}; expected (x, y, z), (n, x, y, z) or (n, 1, x, y, z)")
    side = shape[-3:]
    is_batch = len(shape) > 3

    def read() -> Callable[[int], Grid]:
        grids = load().reshape(-1, *side)
        level = threshold
        if level is None:
            level = 0.0 if grids.dtype.kind == "f" and bool((grids < 0).any()) else 0.5
        return lambda i: _inside(grids[i], level)

    return GridFile(num=shape[0] if is_batch else 1, shape=_checked_side(side), is_batch=is_batch, read=read)


def _inside(grid: np.ndarray, threshold: float) -> Grid:
    if grid.dtype.kind != "f":
        return np.asarray(grid > 0)
    if not np.isfinite(grid).all():
        raise DataError("it holds NaN or infinite values")
    return np.asarray(grid > threshold)


def _checked_side(side: tuple[int, ...]) -> tuple[int, int, int]:
    if min(side) < 1 or max(side) > MAX_RESOLUTION:
        raise DataError(f"its grids are {' x '.join(map(str, side))}; 1 to {MAX_RESOLUTION} voxels a side can be read")
    return side[0], side[1], side[2]


def _npz_headers(path: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    headers = {}
    with zipfile.ZipFile(path) as archive:
        if sum(member.file_size for member in archive.infolist()) > MAX_FILE_BYTES:
            raise DataError(f"it unpacks to more than {MAX_FILE_BYTES >> 30} GiB; split it")
        for member in archive.infolist():
            if member.filename.endswith(".npy"):
                with archive.open(member) as stream:
                    headers[member.filename[:-4]] = _npy_header(stream, member.file_size)
    return headers


def _choose(headers: dict[str, tuple[tuple[int, ...], np.dtype]], key: str | None) -> str:
    grids = [name for name, (shape, _) in headers.items() if len(shape) in (3, 4, 5)]
    choice = [key] if key is not None else [PACKED_KEY] if PACKED_KEY in headers else grids
    if len(choice) != 1 or choice[0] not in headers:
        names = ", ".join(f"{name} {shape}" for name, (shape, _) in headers.items()) or "none"
        raise DataError(f"which of its arrays holds the grids? Name one with --key; it has {names}")
    return choice[0]


def _require_numbers(dtype: np.dtype) -> None:
    if dtype.kind not in "biuf":
        raise DataError(f"its array is of {dtype}; use bool, integers or floats")


def _npy_header(stream: IO[bytes], size: int) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and type of an .npy stream of `size` bytes, which must be exactly what they need (objects are never read)."""
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise DataError(f"it is .npy version {version}; save it again with numpy.save")
    try:
        shape, _, dtype = readers[version](stream)
    except Exception as error:  # NumPy parses the header as Python text: a garbled one raises whatever a parser can
        raise DataError("its .npy header is garbled; is it damaged?") from error
    if not dtype.hasobject and stream.tell() + math.prod(shape) * dtype.itemsize != size:
        raise DataError(f"its header declares {shape} of {dtype}, its size is {size} bytes; is it cut off?")
    return shape, dtype
