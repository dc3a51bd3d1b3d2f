"""The folder that a data set is written to: one writer at a time, and one clear error for whatever the system refuses there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from shapediff.errors import DataError
from shapediff.files import exclusive

CACHE_FOLDER = ".cache"


@contextmanager
def writing(out: Path, *, kept: str = "") -> Iterator[None]:
    """Hold the folder `out` while it is written; `kept` says what another run need not do again.

    Raises DataError if another process holds it or the system refuses something, such as room on the disk.
    """
    with clear_refusals(out, kept=kept), exclusive(out / CACHE_FOLDER / "lock"):
        yield


@contextmanager
def clear_refusals(out: Path, *, kept: str = "") -> Iterator[None]:
    """`writing` without holding `out`, for what comes before."""
    try:
        yield
    except BlockingIOError as error:
        raise DataError(f"another process is writing {out}; wait for it, or give another folder") from error
    except OSError as error:
        raise DataError(
            f"{out} cannot be written: {error}. What it held before is whole; "
            f"make room and run the same command again{kept and f': {kept}'}"
        ) from error
