"""The pool: every job is answered once, a job that kills or blocks its worker is lost alone."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from contextlib import closing
from pathlib import Path

import pytest

from shapediff.data.workers import JobLost, run_jobs
from shapediff.errors import ShapediffError

MODULE = "tests.data.trying_worker"


@pytest.mark.parametrize("num_workers", [1, 3])
def test_only_the_job_that_fails_is_lost(num_workers: int) -> None:
    doings = ["answer", "die", "answer", "abort", "hang", "answer"]
    jobs = [{"number": i, "do": do} for i, do in enumerate(doings)]
    answers = dict(run_jobs(jobs, module=MODULE, num_workers=num_workers, timeout=2.0))
    assert sorted(answers) == list(range(len(jobs)))
    for i in (0, 2, 5):
        assert answers[i] == {"square": i * i, "threads": "1"}
    reasons = [answer.reason for answer in (answers[1], answers[3], answers[4]) if isinstance(answer, JobLost)]
    assert reasons == [
        "the worker process died (exit status 7)",
        "the worker process died (SIGABRT)",
        "took longer than 2 s; raise --timeout",
    ]


def test_closing_stops_the_workers_at_once() -> None:
    jobs = [{"number": 0, "do": "answer"}, {"number": 1, "do": "hang"}]
    started = time.perf_counter()
    with closing(run_jobs(jobs, module=MODULE, num_workers=1, timeout=100.0)) as answers:
        assert next(answers)[0] == 0
    assert time.perf_counter() - started < 30


def test_a_worker_that_cannot_start_is_an_error_not_a_lost_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRYING_WORKER_FAILS", "1")
    with pytest.raises(ShapediffError, match="could not start: OSError: this library is missing"):
        next(run_jobs([{"number": 0, "do": "answer"}], module=MODULE, num_workers=1, timeout=10.0))


def test_many_jobs_are_each_answered_once() -> None:
    jobs = [{"number": i, "do": "answer"} for i in range(40)]
    answers = list(run_jobs(jobs, module=MODULE, num_workers=2, timeout=20.0))
    assert sorted(place for place, _ in answers) == list(range(40))
    assert all(itertools.starmap(lambda place, answer: answer["square"] == place**2, answers))


@pytest.mark.skipif(sys.platform != "linux", reason="the system tells a child of its parent's death on Linux alone")
def test_kill_9_of_the_run_takes_a_hanging_worker_along() -> None:
    code = (
        "from shapediff.data import workers\n"
        "worker = workers.Worker('tests.data.trying_worker', timeout=100)\n"
        "print(worker._running().pid, flush=True)\n"
        "worker.ask({'number': 0, 'do': 'hang'})\n"
    )
    root = Path(__file__).resolve().parents[2]
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=root) as run:
        assert run.stdout is not None
        pid = int(run.stdout.readline())
        time.sleep(0.2)
        run.kill()
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/cmdline").exists() and Path(f"/proc/{pid}/cmdline").read_bytes():
        assert time.monotonic() < deadline, os.kill(pid, 9)
        time.sleep(0.05)
