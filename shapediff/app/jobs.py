"""One job at a time, which its visitor can stop."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager

from shapediff.diffusion.samplers import OnStep
from shapediff.errors import ShapediffError

MAX_SECONDS = 900.0
"""A job that takes longer is stopped: others wait for it."""

MAX_VISITORS = 1000


class Stopped(ShapediffError):
    """The job was stopped; what it says is for the visitor."""


class Jobs:
    """Whose turn it is to compute, and who asked to stop."""

    def __init__(self, *, max_seconds: float = MAX_SECONDS) -> None:
        self._max_seconds = max_seconds
        self._turn = threading.Lock()
        self._stops: OrderedDict[str, threading.Event] = OrderedDict()

    def begin(self, visitor: str) -> None:
        """A new job of this visitor is asked for: what was stopped before counts no more."""
        self._stops[visitor] = threading.Event()
        self._stops.move_to_end(visitor)
        while len(self._stops) > MAX_VISITORS:
            self._stops.popitem(last=False)

    def stop(self, visitor: str) -> None:
        """Stop the visitor's job at its next step, or as soon as its turn comes."""
        if visitor in self._stops:
            self._stops[visitor].set()

    @contextmanager
    def turn(self, visitor: str, on_step: OnStep | None = None) -> Iterator[OnStep]:
        """Wait for the turn; yields what the sampler must call after each step, which passes it on to `on_step`.

        That raises Stopped once the visitor has asked to stop, or the time is up.
        """
        stop = self._stops.get(visitor) or threading.Event()
        with self._turn:
            ends = time.monotonic() + self._max_seconds

            def step(done: int, steps: int) -> None:
                if stop.is_set():
                    raise Stopped("Stopped.")
                if time.monotonic() > ends:
                    raise Stopped(f"Stopped after {self._max_seconds:g} seconds; ask for fewer shapes or steps.")
                if on_step is not None:
                    on_step(done, steps)

            if stop.is_set():
                raise Stopped("Stopped.")
            yield step
