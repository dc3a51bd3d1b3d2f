"""Writing so that nothing half-written is ever in place: write beside, then rename."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replaced_file(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to; on success it takes the place of `path`, on failure it is removed."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # The suffix stays last: writers choose a format by it.
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def replaced_directory(path: str | Path) -> Iterator[Path]:
    """A fresh directory beside `path` to fill; on success it takes the place of `path`, on failure it is removed."""
    path = Path(path)
    partial, old = (path.with_name(f".{path.name}.{os.getpid()}.{part}") for part in ("partial", "old"))
    _put_back(old, path)  # of a process that had this number before and was killed
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        if path.exists():
            os.replace(path, old)
        os.replace(partial, path)
    finally:
        _put_back(old, path)
        shutil.rmtree(partial, ignore_errors=True)


def _put_back(old: Path, path: Path) -> None:
    """What `path` was before, where nothing took its place; else it is removed."""
    if old.exists() and not path.exists():
        os.replace(old, path)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def exclusive(path: str | Path, *, waits: bool = False) -> Iterator[None]:
    """Hold the lock file `path`, which the system frees when a process ends.

    Raises BlockingIOError if another process holds it, or waits for that one.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        if fcntl is not None:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if waits else fcntl.LOCK_NB))
        yield


def write_text(path: str | Path, text: str) -> None:
    """Write a whole text file at once, UTF-8."""
    with replaced_file(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write JSON, indented, UTF-8, at once."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")
