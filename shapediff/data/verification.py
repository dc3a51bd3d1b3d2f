"""Checking a data set on disk, byte for byte: which shards and which shapes in them are damaged."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shapediff.data.manifest import SHARDS_FOLDER, Manifest, ShapeInfo, read_manifest
from shapediff.data.packing import unpack_signal
from shapediff.data.shards import Shard, file_hash, grid_hash, open_shard
from shapediff.errors import DataError


@dataclass(frozen=True)
class DamagedShard:
    """`file` is a name in shards/; `shapes` are the ids of the shapes in it that are not what was written."""

    file: str
    reason: str
    shapes: list[str]


@dataclass(frozen=True)
class VerifyReport:
    """The data set is whole if `damaged` is empty."""

    num_shards: int
    num_shapes: int
    damaged: list[DamagedShard]


def verify_dataset(path: Path | str) -> VerifyReport:
    """Check the hash of every shard, and decode every shape and check its own hash, its label and its values.

    Raises DataError if the manifest itself is missing or not sound.
    """
    root = Path(path)
    manifest = read_manifest(root)
    members: list[list[ShapeInfo]] = [[] for _ in manifest.shards]
    for shape in manifest.shapes:
        members[shape.shard].append(shape)
    found = [_check_shard(root, manifest, number, shapes) for number, shapes in enumerate(members)]
    return VerifyReport(
        num_shards=len(manifest.shards),
        num_shapes=len(manifest.shapes),
        damaged=[damage for damage in found if damage is not None],
    )


def _check_shard(root: Path, manifest: Manifest, number: int, shapes: list[ShapeInfo]) -> DamagedShard | None:
    info = manifest.shards[number]
    try:
        shard = open_shard(root, manifest, number)
    except DataError as error:
        return DamagedShard(info.file, str(error), [shape.id for shape in shapes])
    bad = [shape.id for shape in shapes if not _is_whole(shard, shape, manifest)]
    if file_hash(root / SHARDS_FOLDER / info.file) != info.sha256:
        return DamagedShard(info.file, "its sha256 is not the manifest's", bad)
    return DamagedShard(info.file, "its shapes are not what the manifest says", bad) if bad else None


def _is_whole(shard: Shard, shape: ShapeInfo, manifest: Manifest) -> bool:
    row = shard.grids[shape.index]
    if grid_hash(row) != shape.grid_sha256 or shard.labels[shape.index] != manifest.classes.index(shape.class_name):
        return False
    signal = unpack_signal(row[None], field=manifest.field)[0]
    return bool(np.abs(signal).max() <= 1.0 and signal.max() > 0.0)
