"""A pool of worker processes for jobs that may hang or crash: such a job is lost alone, with the reason.

`concurrent.futures` cannot do this: one crash breaks its whole pool without telling whose it was, and a
hanging job cannot be stopped. Each worker here is a Python process that answers one JSON line with one JSON
line.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shapediff.errors import ShapediffError

_ROOT = Path(__file__).resolve().parents[2]
_SINGLE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True)
class JobLost:
    """What became of a job that got no answer: its worker died or ran out of time."""

    reason: str


def run_jobs(
    jobs: Sequence[dict[str, Any]], *, module: str, num_workers: int, timeout: float
) -> Generator[tuple[int, dict[str, Any] | JobLost], None, None]:
    """Yield (place in `jobs`, answer) as they come. `module` names a module whose `main()` calls `serve`.

    A job that takes longer than `timeout` seconds, or whose worker dies, yields a JobLost and costs no other
    job anything. Closing the iterator stops the workers. Raises ShapediffError if a worker cannot start at all.
    """
    waiting: queue.SimpleQueue[int] = queue.SimpleQueue()
    for place in range(len(jobs)):
        waiting.put(place)
    answers: queue.SimpleQueue[tuple[int, dict[str, Any] | JobLost] | Exception] = queue.SimpleQueue()
    workers = [Worker(module, timeout=timeout) for _ in range(min(num_workers, len(jobs)))]
    for worker in workers:
        threading.Thread(target=_feed, args=(worker, jobs, waiting, answers), daemon=True).start()
    try:
        for _ in jobs:
            answer = answers.get()
            if isinstance(answer, Exception):
                raise answer
            yield answer
    finally:
        for worker in workers:
            worker.stop()


def serve(handle: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The loop of a worker process: answer each line of standard input by `handle`, until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent decides
    _die_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # libraries that print must not write between the answers
    _write_line(answers, {"ready": True})
    for line in sys.stdin:
        _write_line(answers, handle(json.loads(line)))


def _die_with_parent() -> None:
    """Where the system can see to it: nobody would stop a job that hangs after `kill -9` of the run."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


class Worker:
    """One process, started when first asked and again after a death; `timeout` in seconds a job."""

    def __init__(self, module: str, *, timeout: float) -> None:
        # Not `-m`: it would put the caller's folder, and whatever modules lie there, first in sys.path.
        code = f"import sys; sys.path[0] = {str(_ROOT)!r}; from {module} import main; main()"
        self._command = [sys.executable, "-c", code]
        self.timeout = timeout
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._stopped = False

    def ask(self, job: dict[str, Any]) -> dict[str, Any] | JobLost:
        """The answer to one job; raises ShapediffError if no process will start."""
        process = self._running()
        self._spoken = os.fstat(self._stderr.fileno()).st_size
        out_of_time = threading.Event()

        def give_up() -> None:
            out_of_time.set()
            process.kill()

        watchdog = threading.Timer(self.timeout, give_up)
        watchdog.start()
        answer = _exchange(process, job)
        watchdog.cancel()
        if answer is None or out_of_time.is_set():
            self._discard()
        if answer is not None:
            return answer
        if out_of_time.is_set():
            return JobLost(f"took longer than {self.timeout:g} s; raise --timeout")
        return JobLost(f"the worker process died ({_cause_of_death(process.returncode)}){self._last_words()}")

    def stop(self) -> None:
        with self._lock:
            self._stopped = True
        self._discard()

    def _running(self) -> subprocess.Popen[str]:
        with self._lock:
            if self._stopped:
                raise ShapediffError("the pool is closed")
            if self._process is not None and self._process.poll() is None:
                return self._process
            self._close()
            try:
                self._process = process = self._start()
            except OSError as error:
                raise ShapediffError(f"a worker process could not start: {error}") from error
        if not process.stdout.readline():  # type: ignore[union-attr]
            process.wait()
            raise ShapediffError(f"a worker process could not start{self._last_words()}")
        return process

    def _start(self) -> subprocess.Popen[str]:
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 (lives as long as the process)
        self._spoken = 0
        return subprocess.Popen(
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env={**os.environ, **_SINGLE_THREAD},
            text=True,
        )

    def _discard(self) -> None:
        process = self._process
        if process is not None:
            process.kill()
            process.wait()

    def _close(self) -> None:
        if self._process is not None:
            for stream in (self._process.stdin, self._process.stdout, self._stderr):
                with contextlib.suppress(OSError):  # what was written but not sent to the dead process
                    stream.close()  # type: ignore[union-attr]

    def _last_words(self) -> str:
        """The last line that the process wrote to its standard error during the job that it died of."""
        size = os.fstat(self._stderr.fileno()).st_size
        self._stderr.seek(max(self._spoken, size - 4096))
        lines = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        return f": {lines[-1][:300]}" if lines else ""


def _feed(
    worker: Worker, jobs: Sequence[dict[str, Any]], waiting: queue.SimpleQueue, answers: queue.SimpleQueue
) -> None:
    while True:
        try:
            place = waiting.get_nowait()
        except queue.Empty:
            return
        try:
            answers.put((place, worker.ask(jobs[place])))
        except Exception as error:  # handed to the thread that reads the answers, which raises it
            answers.put(error)
            return


def _exchange(process: subprocess.Popen[str], job: dict[str, Any]) -> dict[str, Any] | None:
    try:
        _write_line(process.stdin, job)
        line = process.stdout.readline()  # type: ignore[union-attr]
    except OSError:
        return None
    return json.loads(line) if line.endswith("\n") else None


def _write_line(stream: Any, record: dict[str, Any]) -> None:
    stream.write(json.dumps(record) + "\n")
    stream.flush()


def _cause_of_death(returncode: int) -> str:
    if returncode >= 0:
        return f"exit status {returncode}"
    name = signal.Signals(-returncode).name if -returncode in set(signal.Signals) else f"signal {-returncode}"
    return f"{name}, often too little memory" if name == "SIGKILL" else name
