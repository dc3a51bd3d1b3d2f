"""Being told to stop: signals raise a flag that the loop looks at after each step."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

STOPPED = 75
"""Exit status of a run that was told to stop and can be resumed (EX_TEMPFAIL: try again)."""


@dataclass
class StopFlag:
    """Whether this process was told to stop."""

    is_set: bool = False


@contextmanager
def stop_signals() -> Iterator[StopFlag]:
    """Within, SIGTERM and SIGINT set the flag in place of ending the process."""
    flag = StopFlag()

    def set_flag(signum: int, frame: FrameType | None) -> None:
        flag.is_set = True

    before = {number: signal.signal(number, set_flag) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
