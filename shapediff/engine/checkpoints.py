"""When a run saves its state, and what becomes of a state that cannot be saved."""

from __future__ import annotations

import logging
from pathlib import Path

from shapediff.engine import distributed
from shapediff.engine.config import LoopConfig
from shapediff.engine.ema import Ema
from shapediff.engine.shares import Shares
from shapediff.engine.state import Progress, load_newest_state, prune, save_state
from shapediff.errors import CheckpointError

log = logging.getLogger(__name__)


class Checkpoints:
    """The states of one run in `directory`; every rank calls every method, with the same progress."""

    def __init__(self, directory: Path, loop: LoopConfig, shares: Shares, ema: Ema) -> None:
        self._directory, self._loop = directory, loop
        self._shares, self._ema = shares, ema
        self._saved: Progress | None = None
        self._last_seconds = 0.0

    def resume(self) -> Progress:
        """Take up the newest intact state; the start where there is none. Raises CheckpointError as load_newest_state does."""
        self._saved = load_newest_state(self._directory, self._shares, self._ema)
        progress = self._saved or Progress()
        self._last_seconds = progress.seconds
        return progress

    def save_if_due(self, progress: Progress) -> None:
        """Save by steps or by time. Where that cannot be, warn: the run is worth more than this one state."""
        every, minutes = self._loop.checkpoint_every, self._loop.checkpoint_minutes
        by_steps = bool(every) and progress.step % every == 0
        # The ranks agree on the seconds of a run, not on what their own clocks say.
        by_time = minutes is not None and progress.seconds - self._last_seconds >= 60 * minutes
        if not (by_steps or by_time):
            return
        try:
            self.save(progress)
        except CheckpointError as error:
            if distributed.is_main():
                log.warning("%s; the run goes on, the states before it stay", error)

    def save(self, progress: Progress) -> None:
        """Save, unless that very state is saved. Raises CheckpointError where a rank cannot write."""
        keep = {"keep": self._loop.keep_checkpoints, "keep_every": self._loop.keep_every}
        if progress == self._saved:
            if distributed.is_main():
                prune(self._directory, **keep)  # a run that was killed may have come no further than to save it
            return
        self._last_seconds = progress.seconds
        save_state(self._directory, progress, self._shares, self._ema, **keep)
        self._saved = progress
