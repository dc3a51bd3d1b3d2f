"""A folder of meshes -> a data set: find, normalise, voxelise in worker processes, write shards.

The result depends on the meshes and the settings alone: not on the number of workers, nor on how often the
run was interrupted. Each finished mesh is kept in OUT/.cache, which may be deleted at any time.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from shapediff.data import mesh_job
from shapediff.data.manifest import SPLITS, Field, Manifest, Split
from shapediff.data.mesh_job import PrepareSettings
from shapediff.data.report import PrepareSummary, Progress, ReportLine, log_skip, summarize, write_report
from shapediff.data.shards import SHARD_BYTES, ShardWriter
from shapediff.data.sources import Source, caption_of, find_meshes
from shapediff.data.workers import JobLost, run_jobs
from shapediff.errors import ConfigError, DataError

CACHE_FOLDER = ".cache"


@dataclass(frozen=True)
class _Result:
    """A mesh's report line and, for status ok, the key of its grid in the cache."""

    line: ReportLine
    key: str = ""


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
    shard_bytes: int = SHARD_BYTES,
    progress: Progress | None = None,
) -> PrepareSummary:
    """Voxelise every mesh below MESHES/<class>/ and write the data set OUT; meshes that cannot be used are
    skipped.

    A mesh lying directly in MESHES gets that folder's name as its class. The first line of <mesh>.txt beside
    it is kept as its caption. OUT/report.jsonl tells what became of each mesh. Run again to continue, or to
    take in new meshes: finished ones are not done again.

    Args:
        truncation: of a TSDF, in voxels.
        workers: processes of one thread each; 0 does the work in this process, where no crash or hang is
        caught. classes: the classes to use, in the order of their labels; None: all that yield a shape, by
        name. limit: at most this many meshes of each class, the first by name. splits: the split of some
        meshes by their path below MESHES; that of the others follows from a hash of the path. timeout:
        seconds that one mesh may take.

    Raises ConfigError for a setting that cannot work, DataError if no mesh was found or none could be used.
    """
    settings = PrepareSettings(resolution=resolution, field=field, truncation=truncation, up=up)
    _check(workers=workers, timeout=timeout, limit=limit, splits=splits or {})
    started, out = time.perf_counter(), Path(out)
    sources = find_meshes(meshes, classes=classes, limit=limit, leave_out=out)
    cache = out / CACHE_FOLDER
    cache.mkdir(parents=True, exist_ok=True)
    jobs = [mesh_job.make_job(source.path, settings, cache) for source in sources]
    with closing(_answers(jobs, workers=workers, timeout=timeout)) as answers:
        results = _collect(answers, sources, progress)
    lines = [result.line for result in results]
    write_report(out, lines)
    done = [(source, result.key) for source, result in zip(sources, results, strict=True) if result.line.status == "ok"]
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
    return summarize(out, manifest, lines, seconds=time.perf_counter() - started)


def _check(*, workers: int, timeout: float, limit: int | None, splits: Mapping[str, Split]) -> None:
    if workers < 0 or timeout <= 0 or (limit is not None and limit < 1):
        raise ConfigError(f"workers={workers} must be 0 or more, timeout={timeout} above 0, limit={limit} 1 or more")
    unknown = set(splits.values()) - set(SPLITS)
    if unknown:
        raise ConfigError(f"splits names {', '.join(map(repr, sorted(unknown)))}; use {', '.join(SPLITS)}")


def _answers(
    jobs: list[dict[str, Any]], *, workers: int, timeout: float
) -> Generator[tuple[int, dict[str, Any] | JobLost], None, None]:
    if workers == 0:
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
    return _Result(ReportLine(source=name, **answer["line"]), key=answer["key"])


def _write(
    writer: ShardWriter,
    done: list[tuple[Source, str]],
    settings: PrepareSettings,
    cache: Path,
    splits: Mapping[str, Split],
) -> Manifest:
    for source, key in done:
        cached = mesh_job.read_grid(cache, key, settings)
        if cached is None:
            raise DataError(f"the prepared grid of {source.name} vanished from {cache}; run again")
        row, facts = cached
        writer.add(
            row,
            id=source.name,
            source=source.name,
            class_name=source.class_name,
            split=splits.get(source.name),
            transform=facts["transform"],
            caption=caption_of(source.path),
        )
    return writer.finish()
