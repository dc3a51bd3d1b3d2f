"""The data set on disk: safetensors shards beside a manifest, written so that a reader never sees half of
one.

    OUT/manifest.json                     written last, by renaming
    OUT/shards/00000-<sha256>.safetensors grids (n, bytes a row) uint8 | int8, labels (n,) int64

A shard's name carries its contents' hash, so a new data set in the same folder never overwrites a shard of
the old one: until the new manifest is in place the old data set stays whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64
from safetensors.numpy import save

from shapediff.data.manifest import (
    MANIFEST_NAME,
    SHARDS_FOLDER,
    Field,
    Manifest,
    ShapeInfo,
    ShardInfo,
    Split,
    split_of,
)
from shapediff.data.packing import ROW_DTYPES, Row, Rows, row_length
from shapediff.errors import DataError
from shapediff.files import replaced_file

SHARD_BYTES = 64 << 20
_MAX_HEADER_BYTES = 64 << 10
_SAFETENSORS_DTYPES: dict[str, np.dtype] = {
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I64": np.dtype("<i8"),
}

# {tensor name: (dtype, shape, byte offset in the file)}
_Layout = dict[str, tuple[np.dtype, tuple[int, ...], int]]


@dataclass(frozen=True)
class Shard:
    """An open shard: `grids` is a read-only memory map, `labels` are in memory."""

    grids: Rows
    labels: Int64[np.ndarray, " n"]


class ShardWriter:
    """Writes a data set shape by shape; nothing of it counts until `finish`."""

    def __init__(
        self,
        out: Path | str,
        *,
        resolution: int,
        field: Field,
        truncation_voxels: float,
        classes: list[str],
        shard_bytes: int = SHARD_BYTES,
    ) -> None:
        """Start in folder `out`; `classes` fixes the labels, a shard takes about `shard_bytes`."""
        self._root = Path(out)
        self._resolution, self._field, self._classes = resolution, field, list(classes)
        self._truncation_voxels = float(truncation_voxels) if field == "tsdf" else 0.0
        self._rows_a_shard = max(1, shard_bytes // row_length(resolution, field))
        self._rows: list[Row] = []
        self._labels: list[int] = []
        self._shapes: list[ShapeInfo] = []
        self._shards: list[ShardInfo] = []
        self._split_by_grid: dict[str, Split] = {}
        (self._root / SHARDS_FOLDER).mkdir(parents=True, exist_ok=True)

    def add(
        self,
        row: Row,
        *,
        id: str,
        source: str,
        class_name: str,
        split: Split | None = None,
        transform: dict[str, Any] | None = None,
        caption: str | None = None,
    ) -> None:
        """Append one shape, packed by `pack_grid`.

        Unless given, its split follows from its id, or from that of the first shape with the same grid: copies with names of
        their own would else be trained on and tested with.
        """
        assert row.dtype == ROW_DTYPES[self._field], f"row of {row.dtype} for {self._field}"
        assert row.shape == (row_length(self._resolution, self._field),), f"row of shape {row.shape}"
        grid_sha256 = grid_hash(row)
        self._shapes.append(
            ShapeInfo(
                id=id,
                source=source,
                class_name=class_name,
                split=split or self._split_by_grid.setdefault(grid_sha256, split_of(id)),
                shard=len(self._shards),
                index=len(self._rows),
                grid_sha256=grid_sha256,
                transform=transform,
                caption=caption,
            )
        )
        self._labels.append(self._classes.index(class_name))
        self._rows.append(row)
        if len(self._rows) == self._rows_a_shard:
            self._write_shard()

    def finish(self) -> Manifest:
        """Write the last shard and the manifest, then remove shards that no manifest names.

        Raises DataError if no shape was added; what the folder held before then still stands.
        """
        if self._rows:
            self._write_shard()
        if not self._shards:
            raise DataError("no shape to write: every source was skipped; the report says why")
        manifest = Manifest(
            resolution=self._resolution,
            field=self._field,
            truncation_voxels=self._truncation_voxels,
            classes=self._classes,
            shards=self._shards,
            shapes=self._shapes,
        )
        text = manifest.to_json()
        Manifest.from_json(text)  # what would be refused on reading is refused before it replaces a good one
        write_bytes(self._root / MANIFEST_NAME, text.encode("ascii"))
        self._remove_others()
        return manifest

    def _write_shard(self) -> None:
        labels = np.asarray(self._labels, dtype=np.int64)
        content = save({"grids": np.stack(self._rows), "labels": labels})
        digest = hashlib.sha256(content).hexdigest()
        name = f"{len(self._shards):05d}-{digest[:12]}.safetensors"
        write_bytes(self._root / SHARDS_FOLDER / name, content)
        self._shards.append(ShardInfo(file=name, sha256=digest, num=len(self._rows)))
        self._rows, self._labels = [], []

    def _remove_others(self) -> None:
        kept = {shard.file for shard in self._shards}
        for path in (self._root / SHARDS_FOLDER).iterdir():
            if path.name not in kept and path.suffix == ".safetensors":
                path.unlink(missing_ok=True)


def open_shard(root: Path | str, manifest: Manifest, number: int) -> Shard:
    """Shard `number` of the data set in `root`, its grids memory-mapped.

    Raises DataError, naming the file, if it is missing or its header, sizes or types are not what the
    manifest says. Its hash is not checked here: data_tools/verify.py does that.
    """
    info = manifest.shards[number]
    path = Path(root) / SHARDS_FOLDER / info.file
    layout = _read_layout(path)
    grids_shape = (info.num, row_length(manifest.resolution, manifest.field))
    expected = {"grids": (ROW_DTYPES[manifest.field], grids_shape), "labels": (np.dtype("<i8"), (info.num,))}
    found = {name: (dtype, shape) for name, (dtype, shape, _) in layout.items()}
    if found != expected:
        raise _damaged(path, f"it holds {found}, the manifest wants {expected}")
    grids = np.memmap(path, dtype=ROW_DTYPES[manifest.field], mode="r", offset=layout["grids"][2], shape=grids_shape)
    labels = np.fromfile(path, dtype="<i8", count=info.num, offset=layout["labels"][2])
    return Shard(grids=grids, labels=labels.astype(np.int64, copy=False))


def grid_hash(row: Row) -> str:
    """The sha256 of a packed row: equal for equal grids of one resolution and field."""
    return hashlib.sha256(row.tobytes()).hexdigest()


def file_hash(path: Path) -> str:
    """The sha256 of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def write_bytes(path: Path, content: bytes) -> None:
    """Write a whole file, on disk before it takes its place: a reader sees the old file or the new one."""
    with replaced_file(path) as partial, partial.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def _read_layout(path: Path) -> _Layout:
    """{name: (dtype, shape, offset in the file)} of a safetensors file, checked against its size."""
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            header_bytes = int.from_bytes(stream.read(8), "little")
            if not 2 <= header_bytes <= min(_MAX_HEADER_BYTES, size - 8):
                raise _damaged(path, f"its header claims {header_bytes} bytes of a file of {size}")
            header = json.loads(stream.read(header_bytes))
        return _checked_layout(header, start=8 + header_bytes, size=size)
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"shard {path.name} is missing from {path.parent}; prepare the data set again") from error
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError) as error:
        raise _damaged(path, f"its header cannot be read: {error!r}") from error


def _checked_layout(header: Any, *, start: int, size: int) -> _Layout:
    layout: _Layout = {}
    end_of_data = start
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        dtype, shape = _SAFETENSORS_DTYPES[entry["dtype"]], tuple(int(n) for n in entry["shape"])
        begin, end = (start + int(offset) for offset in entry["data_offsets"])
        num_bytes = dtype.itemsize
        for length in shape:
            num_bytes *= length
        if min(shape, default=0) < 0 or not start <= begin <= end <= size or end - begin != num_bytes:
            raise ValueError(f"tensor {name!r} of shape {shape} lies at bytes {begin} to {end} of {size}")
        layout[name] = (dtype, shape, begin)
        end_of_data = max(end_of_data, end)
    if end_of_data != size:
        raise ValueError(f"the tensors end at byte {end_of_data} of {size}")
    return layout


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(
        f"shard {path.name} is damaged: {reason}. "
        f"Run data_tools/verify.py on {path.parent.parent}, then prepare it again"
    )
