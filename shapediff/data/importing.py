"""Voxel grids that someone else made (.npz, .npy, .binvox) -> a data set of occupancy."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool

from shapediff.data.grid_files import GRID_SUFFIXES, READ_ERRORS, Grid, GridFile, open_grid_file
from shapediff.data.manifest import is_resolution
from shapediff.data.output import writing
from shapediff.data.packing import pack_grid
from shapediff.data.report import PrepareSummary, Progress, ReportLine, log_skip, summarize, write_report
from shapediff.data.shards import SHARD_BYTES, ShardWriter
from shapediff.data.sources import Source, find_files
from shapediff.errors import ConfigError, DataError


@dataclass(frozen=True)
class _Batch:
    """The grids of one file, under the class that they get."""

    source: Source
    class_name: str
    grids: GridFile

    def name(self, number: int) -> str:
        return f"{self.source.name}#{number:05d}" if self.grids.is_batch else self.source.name


@dataclass(frozen=True)
class _Frame:
    """How a grid is laid in the cube of the data set; `turns` is by class."""

    resolution: int
    up: Literal["y", "z"]
    turns: Mapping[str, int]

    def place(self, grid: Grid, class_name: str) -> Grid:
        return centred_cube(upright(grid, up=self.up, turns=self.turns.get(class_name, 0)), self.resolution)


def import_voxels(
    grids: Path | str,
    out: Path | str,
    *,
    up: Literal["y", "z"] = "y",
    turns: Mapping[str, int] | None = None,
    resolution: int | None = None,
    key: str | None = None,
    threshold: float = 0.5,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> PrepareSummary:
    """Write the data set OUT of the grids in a folder (or one file); what cannot be used is skipped.

    The class of a grid is the first folder below GRIDS; of a file of many directly in GRIDS, the file's name;
    else the name of GRIDS. A grid is centred in the smallest cube with a power of two a side that holds it,
    its scale left as it is. All must come to one such side: `resolution`, or the one they agree on.

    Args:
        up: the grids' vertical axis; "z" is turned so that y is up and what faced -y faces +z.
        turns: right-handed quarter turns about the vertical after that, by class, to make the front face +z.
        key, threshold: see `open_grid_file`.

    Raises ConfigError for a setting that cannot work, DataError if there is nothing to import, resolutions
    differ, the disk is full or another process writes OUT. A data set that was in OUT before then still stands.
    """
    if up not in ("y", "z") or (resolution is not None and not is_resolution(resolution)):
        raise ConfigError(f"up={up!r} must be 'y' or 'z', resolution={resolution} a power of two from 2 to 1024")
    started, out = time.perf_counter(), Path(out)
    lines: list[ReportLine] = []
    batches = _open_all(_sources(Path(grids), out), key, threshold, lines)
    resolution = resolution or _common_resolution(batches)
    batches = _of_resolution(batches, resolution, lines)
    if not batches:
        raise DataError(f"no grid to import in {grids}; the last was skipped because {lines[-1].reason}")
    classes = sorted({batch.class_name for batch in batches})
    unknown = set(turns or {}) - set(classes)
    if unknown:
        raise ConfigError(f"turns names {', '.join(sorted(unknown))}; the classes are {', '.join(classes)}")
    frame = _Frame(resolution=resolution, up=up, turns=turns or {})
    num_total = len(lines) + sum(batch.grids.num for batch in batches)
    with writing(out):
        writer = ShardWriter(
            out,
            resolution=resolution,
            field="occupancy",
            truncation_voxels=0,
            classes=classes,
            shard_bytes=shard_bytes,
        )
        for line in _add_all(batches, writer, frame):
            lines.append(line)
            if progress is not None:
                progress(line, len(lines), num_total)
        for line in lines:
            log_skip(line)
        lines.sort(key=lambda line: line.source)
        write_report(out, lines)
        manifest = writer.finish()
    return summarize(out, manifest, lines, seconds=time.perf_counter() - started)


def upright(grid: Bool[np.ndarray, "x y z"], *, up: Literal["y", "z"], turns: int = 0) -> Bool[np.ndarray, "x y z"]:
    """The grid with y up, (x, y, z) -> (x, z, -y) for up="z"; then quarter turns about y, each +z to +x."""
    if up == "z":
        grid = grid.transpose(0, 2, 1)[:, :, ::-1]
    return np.rot90(grid, turns, (2, 0))


def centred_cube(grid: Bool[np.ndarray, "x y z"], resolution: int) -> Bool[np.ndarray, "r r r"]:
    """The grid in the middle of an empty cube; where the room is odd, the smaller half comes first."""
    before = [(resolution - side) // 2 for side in grid.shape]
    return np.pad(grid, [(b, resolution - side - b) for b, side in zip(before, grid.shape, strict=True)])


def _sources(grids: Path, out: Path) -> list[Source]:
    if grids.is_file():
        if grids.suffix.lower() not in GRID_SUFFIXES:
            raise DataError(f"{grids} is not one of {', '.join(GRID_SUFFIXES)}")
        return [Source(path=grids, name=grids.name, class_name=grids.resolve().parent.name or "shape")]
    return find_files(grids, suffixes=GRID_SUFFIXES, leave_out=out)


def _open_all(sources: list[Source], key: str | None, threshold: float, lines: list[ReportLine]) -> list[_Batch]:
    batches = []
    for source in sources:
        try:
            grids = open_grid_file(source.path, key=key, threshold=threshold)
        except DataError as error:
            lines.append(ReportLine(source=source.name, status="skipped", reason=str(error)))
            continue
        lies_in_folder = "/" in source.name
        class_name = source.path.stem if grids.is_batch and not lies_in_folder else source.class_name
        batches.append(_Batch(source=source, class_name=class_name, grids=grids))
    return batches


def _common_resolution(batches: list[_Batch]) -> int:
    counts: Counter[int] = Counter()
    for batch in batches:
        counts[_cube_side(batch.grids.shape)] += batch.grids.num
    if len(counts) > 1:
        found = ", ".join(f"{num} of {side}^3" for side, num in sorted(counts.items()))
        raise DataError(f"the grids need cubes of different sizes ({found}); choose one with --resolution")
    return next(iter(counts), 0)


def _of_resolution(batches: list[_Batch], resolution: int, lines: list[ReportLine]) -> list[_Batch]:
    kept = []
    for batch in batches:
        side = _cube_side(batch.grids.shape)
        if side == resolution:
            kept.append(batch)
            continue
        shape = " x ".join(map(str, batch.grids.shape))
        lines.append(
            ReportLine(
                source=batch.source.name,
                status="skipped",
                reason=f"its grids of {shape} need a cube of {side}^3, not {resolution}^3",
            )
        )
    return kept


def _cube_side(shape: tuple[int, int, int]) -> int:
    return max(2, 1 << (max(shape) - 1).bit_length())


def _add_all(batches: list[_Batch], writer: ShardWriter, frame: _Frame) -> Iterator[ReportLine]:
    for batch in batches:
        try:
            get = batch.grids.read()
        except READ_ERRORS as error:
            yield ReportLine(source=batch.source.name, status="skipped", reason=f"it cannot be read: {error}")
            continue
        for number in range(batch.grids.num):
            yield _add(batch, number, get, writer, frame)


def _add(batch: _Batch, number: int, get: Callable[[int], Grid], writer: ShardWriter, frame: _Frame) -> ReportLine:
    started, name = time.perf_counter(), batch.name(number)
    try:
        grid = frame.place(get(number), batch.class_name)
    except READ_ERRORS as error:
        return ReportLine(source=name, status="skipped", reason=str(error))
    if not grid.any():
        return ReportLine(source=name, status="skipped", reason="it is empty: no voxel is inside")
    row = pack_grid(grid, field="occupancy")
    writer.add(row, id=name, source=batch.source.name, class_name=batch.class_name)
    seconds = round(time.perf_counter() - started, 5)
    return ReportLine(source=name, status="ok", fill=float(grid.mean()), seconds=seconds)
