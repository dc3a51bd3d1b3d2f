"""Small data sets and meshes for the tests of the data layer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from shapediff.data.manifest import Field, Manifest
from shapediff.data.packing import pack_grid, row_length
from shapediff.data.shards import ShardWriter


def make_grids(num: int, *, resolution: int, field: Field = "occupancy", seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).uniform(-1, 1, (num, resolution, resolution, resolution))
    return values < -0.4 if field == "occupancy" else values.astype(np.float32)


def write_dataset(
    out: Path,
    *,
    num: int = 10,
    resolution: int = 8,
    field: Field = "occupancy",
    rows_a_shard: int = 4,
    num_classes: int = 2,
    seed: int = 0,
) -> Manifest:
    classes = [f"class{i}" for i in range(num_classes)]
    writer = ShardWriter(
        out,
        resolution=resolution,
        field=field,
        truncation_voxels=3.0,
        classes=classes,
        shard_bytes=rows_a_shard * row_length(resolution, field),
    )
    for i, grid in enumerate(make_grids(num, resolution=resolution, field=field, seed=seed)):
        name = classes[i % num_classes]
        writer.add(
            pack_grid(grid, field=field), id=f"{name}/{i:03d}.obj", source=f"{name}/{i:03d}.obj", class_name=name
        )
    return writer.finish()


def files_of(folder: Path) -> dict[str, bytes]:
    """The data set proper, {relative path: bytes}: without the report, whose times differ, and the cache."""
    paths = [path for path in folder.rglob("*") if path.is_file() and ".cache" not in path.parts]
    return {str(p.relative_to(folder)): p.read_bytes() for p in paths if p.name != "report.jsonl"}
