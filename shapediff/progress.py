"""What a long command shows while a gallery fills, and how it is stopped."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from shapediff.diffusion.samplers import OnStep
from shapediff.gallery import POLL_SECONDS, Gallery

PATIENCE = 60.0
"""Seconds that rank 0 waits for a shape of any other rank, or five times as long as its own took."""


class Stopped(KeyboardInterrupt):
    """This process was told to stop, by `signal`."""

    def __init__(self, signal: int) -> None:
        self.signal = signal


@contextmanager
def stoppable() -> Iterator[None]:
    """Within, Ctrl-C and SIGTERM raise Stopped, once: what follows is short and must not be cut off."""

    def stop(number: int, frame: FrameType | None) -> None:
        for each in before:
            signal.signal(each, signal.SIG_IGN)
        raise Stopped(number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class GalleryProgress:
    """A bar of the shapes of all ranks, what this one has in the making counted in parts."""

    def __init__(self, gallery: Gallery, names: list[str], *, shown: bool) -> None:
        columns = (TextColumn("shapes"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._bar = Progress(*columns, console=Console(stderr=True), disable=not shown)
        self._gallery, self._names, self._shown = gallery, names, shown
        self._count, self._looked = gallery.count(names), time.monotonic()
        self._task = self._bar.add_task("", total=len(names), completed=self._count)
        self._wrote, self._slowest, self._begun = time.monotonic(), 0.0, 0

    def __enter__(self) -> GalleryProgress:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()

    def start(self, num: int) -> OnStep:
        """Begin with `num` shapes; what to call with the steps done and all steps of them."""
        self._begun = 0

        def step(done: int, steps: int) -> None:
            if self._shown:
                if time.monotonic() - self._looked > POLL_SECONDS:
                    self._look()
                self._bar.update(self._task, completed=self._count + max(0.0, done / steps * num - self._begun))

        return step

    def wrote(self, num: int) -> None:
        """Wrote a batch."""
        now = time.monotonic()
        self._slowest, self._wrote = max(self._slowest, now - self._wrote), now
        self._begun += num
        if self._shown:
            self._gallery.merge_if_due()
            self._look()

    def wait_for_others(self) -> None:
        """Until every shape is there, or none came for long."""
        patience = max(PATIENCE, 5 * self._slowest)
        self._gallery.wait_for(self._names, patience=patience, on_count=lambda count: self._look())

    def _look(self) -> None:
        self._count, self._looked = self._gallery.count(self._names), time.monotonic()
        self._bar.update(self._task, completed=self._count)
