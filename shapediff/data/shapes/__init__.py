"""Procedural shapes: twelve classes of closed parametric meshes, each from a seed, with a caption of what was built."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from shapediff.config_io import unknown_name
from shapediff.errors import ConfigError
from shapediff.files import write_json

if TYPE_CHECKING:
    from shapediff.data.shapes.parts import Shape

CLASSES = (
    "airplane", "bed", "bench", "bookshelf", "bottle", "car", "chair", "lamp", "mug", "sofa", "stool", "table",
)  # fmt: skip
FORMATS = ("obj", "ply")
MADE_WITH = ".made_with.json"
"""In the folder of meshes: what all its files depend on. Hidden, so that it is taken neither for a mesh nor for a class."""

Progress = Callable[[int, int], None]
"""Called with (shapes done, shapes in all)."""


def make_shape(name: str, *, seed: int) -> Shape:
    """A shape of class `name`: the same seed gives the same mesh. Raises ConfigError for an unknown class."""
    from importlib import import_module

    if name not in CLASSES:
        raise ConfigError(unknown_name("class", name, CLASSES))
    build = import_module(f"shapediff.data.shapes.{name}").build
    return build(np.random.default_rng(np.random.SeedSequence([seed, *name.encode()])))


def write_meshes(
    out: Path | str,
    *,
    classes: Sequence[str] = CLASSES,
    per_class: int,
    seed: int = 0,
    workers: int = 1,
    format: str = "obj",
    progress: Progress | None = None,
) -> int:
    """Write OUT/<class>/<class>_00000.obj ... with a caption .txt beside each; returns how many were written now.

    File n of a class depends on (seed, class, n) alone, never on the number of files or workers; files that are there are
    left, so that an interrupted call goes on. Raises ConfigError for an unknown class or format, or if the files in OUT were made
    with another seed or format.
    """
    for name in classes:
        if name not in CLASSES:
            raise ConfigError(unknown_name("class", name, CLASSES))
    if format not in FORMATS:
        raise ConfigError(unknown_name("format", format, FORMATS))
    if per_class < 1 or workers < 1:
        raise ConfigError(f"per_class={per_class} and workers={workers} must be at least 1")
    _require_same(Path(out), {"seed": seed, "format": format})
    jobs = [
        (name, n, seed, str(Path(out) / name / f"{name}_{n:05d}.{format}"))
        for name in classes
        for n in range(per_class)
    ]
    todo = [job for job in jobs if not (Path(job[3]).exists() and Path(job[3]).with_suffix(".txt").exists())]
    done = len(jobs) - len(todo)
    chunks = [todo[i : i + 16] for i in range(0, len(todo), 16)]
    if workers == 1:
        for chunk in chunks:
            _write_chunk(chunk)
            done = _tell(progress, done + len(chunk), len(jobs))
        return len(todo)
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            for chunk, _ in zip(chunks, pool.map(_write_chunk, chunks), strict=True):
                done = _tell(progress, done + len(chunk), len(jobs))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return len(todo)


def _require_same(out: Path, settings: dict[str, Any]) -> None:
    """Put down what a new folder is made with; that of an old one must be the same, or no mesh would tell which it was made with.

    Folders of earlier versions, which do not say, are taken as they are.
    """
    path = out / MADE_WITH
    if not path.exists():
        if not any((out / name).exists() for name in CLASSES):
            write_json(path, settings)
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        differing = [f"{key} {found[key]}, not {value}" for key, value in settings.items() if found[key] != value]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} does not say what the meshes there were made with; give another folder") from error
    if differing:
        raise ConfigError(f"{out} holds meshes made with {' and '.join(differing)}; give another folder, or delete it")


def _tell(progress: Progress | None, done: int, total: int) -> int:
    if progress is not None:
        progress(done, total)
    return done


def _write_chunk(jobs: list[tuple[str, int, int, str]]) -> None:
    from shapediff.files import replaced_file, write_text

    for name, n, seed, path in jobs:
        shape = make_shape(name, seed=int(np.random.SeedSequence([seed, n]).generate_state(1, np.uint64)[0] >> 1))
        write_text(Path(path).with_suffix(".txt"), shape.caption + "\n")
        with replaced_file(path) as partial:
            shape.mesh.export(partial, file_type=partial.suffix[1:])
