"""A folder of meshes -> a data set: find, normalise, voxelise in worker processes, write shards.

The result depends on the meshes and the settings alone: not on the number of workers, nor on how often the
run was interrupted. Each finished mesh is kept in OUT/.cache, which may be deleted at any time.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shapediff.data import mesh_job
from shapediff.data.cluster import run_jobs_on_cluster
from shapediff.data.manifest import SPLITS, Field, Manifest, Split
from shapediff.data.mesh_job import MeshLimits, PrepareSettings
from shapediff.data.output import CACHE_FOLDER, clear_refusals, writing
from shapediff.data.report import PrepareSummary, Progress, ReportLine, log_skip, printable, summarize, write_report
from shapediff.data.shards import SHARD_BYTES, ShardWriter
from shapediff.data.sources import Source, caption_of, find_meshes
from shapediff.data.workers import JobLost, run_jobs
from shapediff.errors import ConfigError, DataError

logger = logging.getLogger(__name__)

_KEPT = "finished meshes are not done again"
DEFAULT_LIMITS = MeshLimits()


@dataclass(frozen=True)
class _Result:
    """A mesh's report line and, for status ok, the key of its grid in the cache and the grid's hash."""

    line: ReportLine
    key: str = ""
    grid_sha256: str = ""


def prepare(
    meshes: Path | str,
    out: Path | str,
    *,
    resolution: int = 64,
    field: Field = "occupancy",
    workers: int = 1,
    truncation: float = 3.0,
    up: Literal["y", "z"] = "y",
    classes: Sequence[str] | None = None,
    limit: int | None = None,
    splits: Mapping[str, Split] | None = None,
    timeout: float = 120.0,
    limits: MeshLimits = DEFAULT_LIMITS,
    cluster: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> PrepareSummary:
    """Voxelise the meshes of a folder, an archive or a table and write the data set OUT; what cannot be used is skipped.

    `sources` tells which layouts are recognised. OUT/report.jsonl tells what became of each mesh. Run again to continue, or to
    take in meshes that were added, changed or deleted: the others are not done again.

    Args:
        truncation: of a TSDF, in voxels.
        workers: processes of one thread each; 0 does the work in this process, where no crash, hang or want of memory is
            caught.
        cluster: address of a Dask scheduler whose workers do the work in place of `workers`.
        classes: the classes to use, in the order of their labels; None: all that yield a shape, by name.
        limit: at most this many meshes of each class, the first by name.
        splits: the split of some meshes by their name in the report; it goes before what the layout says. That of the others
            follows from a hash of the name; they share that of an equal grid.
        timeout: seconds that one mesh may take.
        limits: see `MeshLimits`.

    Raises ConfigError for a setting that cannot work; DataError if no mesh was found or none could be used, if the disk is
    full or another process writes OUT. A data set that was in OUT before then still stands.
    """
    settings = PrepareSettings(resolution=resolution, field=field, truncation=truncation, up=up)
    _check(workers=workers, timeout=timeout, limit=limit, splits=splits or {})
    started, out = time.perf_counter(), Path(out)
    cache = out / CACHE_FOLDER
    with clear_refusals(out, kept=_KEPT):
        sources = find_meshes(meshes, classes=classes, limit=limit, leave_out=out, cache=cache, named=splits or ())
    with writing(out, kept=_KEPT):
        jobs = [mesh_job.make_job(source, settings, limits, cache) for source in sources]
        with closing(_answers(jobs, workers=workers, timeout=timeout, cluster=cluster)) as answers:
            results = _collect(answers, sources, progress)
        lines = [result.line for result in results]
        write_report(out, lines)
        done = [pair for pair in zip(sources, results, strict=True) if pair[1].line.status == "ok"]
        names = list(classes) if classes is not None else sorted({source.class_name for source, _ in done})
        writer = ShardWriter(
            out,
            resolution=resolution,
            field=field,
            truncation_voxels=truncation,
            classes=names,
            shard_bytes=shard_bytes,
        )
        manifest = _write(writer, done, settings, cache, splits or {})
        mesh_job.prune(cache, keys={result.key for _, result in done}, archives={source.path for source in sources})
    class_of = {source.name: source.class_name for source in sources}
    return summarize(out, manifest, lines, seconds=time.perf_counter() - started, class_of=class_of)


def _check(*, workers: int, timeout: float, limit: int | None, splits: Mapping[str, Split]) -> None:
    if workers < 0 or timeout <= 0 or (limit is not None and limit < 1):
        raise ConfigError(f"workers={workers} must be 0 or more, timeout={timeout} above 0, limit={limit} 1 or more")
    unknown = set(splits.values()) - set(SPLITS)
    if unknown:
        raise ConfigError(f"splits names {', '.join(map(repr, sorted(unknown)))}; use {', '.join(SPLITS)}")


def _answers(
    jobs: list[dict[str, Any]], *, workers: int, timeout: float, cluster: str | None
) -> Generator[tuple[int, dict[str, Any] | JobLost], None, None]:
    if cluster is not None:
        yield from run_jobs_on_cluster(jobs, module=mesh_job.__name__, address=cluster, timeout=timeout)
    elif workers == 0:
        yield from ((place, mesh_job.do_job(job)) for place, job in enumerate(jobs))
    else:
        yield from run_jobs(jobs, module=mesh_job.__name__, num_workers=workers, timeout=timeout)


def _collect(
    answers: Iterator[tuple[int, dict[str, Any] | JobLost]], sources: list[Source], progress: Progress | None
) -> list[_Result]:
    results: dict[int, _Result] = {}
    for place, answer in answers:
        result = results[place] = _result(sources[place].name, answer)
        log_skip(result.line)
        if progress is not None:
            progress(result.line, len(results), len(sources))
    return [results[place] for place in range(len(sources))]


def _result(name: str, answer: dict[str, Any] | JobLost) -> _Result:
    if isinstance(answer, JobLost):
        return _Result(ReportLine(source=name, status="skipped", reason=answer.reason))
    if "fatal" in answer:
        raise (OSError if answer.get("unwritable") else DataError)(answer["fatal"])
    return _Result(ReportLine(source=name, **answer["line"]), key=answer["key"], grid_sha256=answer["grid_sha256"])


def _write(
    writer: ShardWriter,
    done: list[tuple[Source, _Result]],
    settings: PrepareSettings,
    cache: Path,
    splits: Mapping[str, Split],
) -> Manifest:
    said_by_grid = _said_splits(done, splits)
    for source, result in done:
        cached = mesh_job.read_grid(cache, result.key, settings)
        if cached is None:
            raise DataError(f"the prepared grid of {source.name} vanished from {cache}; run again")
        row, facts = cached
        writer.add(
            row,
            id=source.name,
            source=source.name,
            class_name=source.class_name,
            split=_said_split(source, splits) or said_by_grid.get(result.grid_sha256),
            transform=facts["transform"],
            caption=caption_of(source),
        )
    return writer.finish()


def _said_split(source: Source, splits: Mapping[str, Split]) -> Split | None:
    return splits.get(source.name, source.split)


def _said_splits(done: list[tuple[Source, _Result]], splits: Mapping[str, Split]) -> dict[str, Split]:
    """Of the grids whose split somebody decided: a copy elsewhere follows it, so that no test shape is trained on.

    Where they were decided in two ways, each stays as it is, as in published splits that others are compared on, with a warning.
    """
    said: dict[str, tuple[str, Split]] = {}
    conflicts = []
    for source, result in done:
        split = _said_split(source, splits)
        if split is not None:
            first, first_split = said.setdefault(result.grid_sha256, (source.name, split))
            if split != first_split:
                conflicts.append(f"{printable(first)} is in {first_split}, {printable(source.name)} in {split}")
    if conflicts:
        logger.warning(
            "%d shapes have the grid of one that was given another split, which is kept: %s. Give them one by --splits to part "
            "training and test",
            *(len(conflicts), "; ".join(conflicts[:3]) + ("; ..." if len(conflicts) > 3 else "")),
        )
    return {grid: split for grid, (_, split) in said.items()}
