"""Preparation on a Dask cluster: a real scheduler and two workers on loopback, one of them killed on the way."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trimesh

from shapediff.data.cluster import do_isolated
from shapediff.data.preparation import prepare
from shapediff.data.report import ReportLine
from shapediff.errors import ConfigError, DataError
from tests.data.data_helpers import files_of
from tests.data.test_preparation import report

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.distributed


def start(name: str, *arguments: str, cwd: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "60s"}
    command = [sys.executable, "-m", f"distributed.cli.dask_{name}", *arguments]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, cwd=cwd)


@contextmanager
def cluster(folder: Path, *, num_workers: int) -> Iterator[tuple[str, list[subprocess.Popen[str]]]]:
    """(address, processes, the scheduler's first) of a scheduler on a free port of this machine."""
    processes = [start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", cwd=folder)]
    try:
        address = next(
            found[0] for line in processes[0].stderr or () if (found := re.search(r"tcp://127\S+:\d+", line))
        )
        for _ in range(num_workers):
            worker = start("worker", address, "--no-nanny", "--nthreads", "1", "--no-dashboard", cwd=folder)
            processes.append(worker)
            next(line for line in worker.stderr or () if "Registered to" in line)
        yield address, processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def write_balls(folder: Path, num: int) -> Path:
    for i in range(num):
        ball = trimesh.creation.icosphere(subdivisions=4)
        ball.apply_scale((1, 1 - 0.01 * i, 1))
        (folder / "ball").mkdir(parents=True, exist_ok=True)
        ball.export(folder / "ball" / f"{i:02d}.ply")
    return folder


def test_a_killed_machine_costs_nothing(tmp_path: Path) -> None:
    meshes = write_balls(tmp_path / "meshes", 24)
    (meshes / "ball" / "bad.obj").write_text("nothing")
    killed: list[int] = []
    with cluster(tmp_path, num_workers=2) as (address, (_, *workers)):

        def kill_one_midway(line: ReportLine, num_done: int, num_total: int) -> None:
            if num_done == 6:
                workers[0].kill()
                killed.append(workers[0].wait())

        summary = prepare(meshes, tmp_path / "out", resolution=64, cluster=address, progress=kill_one_midway)
        assert killed == [-9] and workers[1].poll() is None
        assert summary.num_ok == 24
        again = prepare(meshes, tmp_path / "out", resolution=64, cluster=address)
        assert again.num_reused == 24
    prepare(meshes, tmp_path / "here", resolution=64, workers=2)
    assert files_of(tmp_path / "out") == files_of(tmp_path / "here")
    lines = [{**line, "seconds": 0, "reused": False} for line in report(tmp_path / "out")]
    assert lines == [{**line, "seconds": 0, "reused": False} for line in report(tmp_path / "here")]


def test_a_mesh_that_hangs_costs_the_machine_nothing(tmp_path: Path) -> None:
    meshes = write_balls(tmp_path / "meshes", 3)
    trimesh.creation.icosphere(subdivisions=8).export(meshes / "ball" / "slow.obj")  # 1.3 million faces of text
    with cluster(tmp_path, num_workers=1) as (address, _):
        summary = prepare(meshes, tmp_path / "out", resolution=16, cluster=address, timeout=1.0)
    reasons = {line["source"]: line["reason"] for line in report(tmp_path / "out") if line["status"] == "skipped"}
    assert reasons == {"ball/slow.obj": "took longer than 1 s; raise --timeout"} and summary.num_ok == 3


@pytest.mark.parametrize("lost", ["workers", "scheduler"])
def test_a_cluster_that_is_gone_is_a_clear_error(tmp_path: Path, lost: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither an endless wait nor meshes that are put down as bad."""
    monkeypatch.setattr("shapediff.data.cluster._PATIENCE_SECONDS", 2.0)
    monkeypatch.setattr("shapediff.data.cluster._CONNECT_SECONDS", 5)
    meshes, out = write_balls(tmp_path / "meshes", 12), tmp_path / "out"
    with cluster(tmp_path, num_workers=1) as (address, processes):

        def kill(line: ReportLine, num_done: int, num_total: int) -> None:
            assert line.status == "ok"
            if num_done == 1:
                processes[["scheduler", "workers"].index(lost)].kill()

        with pytest.raises(DataError, match="has no workers any more, or went itself"):
            prepare(meshes, out, resolution=64, cluster=address, progress=kill)
    assert not (out / "manifest.json").exists() and not (out / "report.jsonl").exists()


def test_a_machine_that_can_start_no_process_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = do_isolated({}, "shapediff.no_such_module", 20.0)
    assert isinstance(answer, dict) and "a worker process could not start: ModuleNotFoundError" in answer["fatal"]
    monkeypatch.setattr(sys, "executable", str(tmp_path / "no_python"))
    refused = do_isolated({}, "shapediff.data.mesh_job", 21.0)
    assert isinstance(refused, dict) and "could not start: [Errno 2]" in refused["fatal"]

    def answers(jobs: list[dict[str, Any]], **_: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        yield from ((place, answer) for place in range(len(jobs)))

    monkeypatch.setattr("shapediff.data.preparation.run_jobs_on_cluster", answers)
    meshes, out = write_balls(tmp_path / "meshes", 1), tmp_path / "out"
    prepare(meshes, out, resolution=8, workers=0)
    before = files_of(out)
    with pytest.raises(DataError, match="a worker process could not start") as raised:
        prepare(meshes, out, resolution=8, cluster="tcp://somewhere:1")
    assert "make room" not in str(raised.value) and files_of(out) == before
    assert report(out)[0]["status"] == "ok"


def test_no_scheduler_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shapediff.data.cluster._CONNECT_SECONDS", 1)
    meshes = write_balls(tmp_path / "meshes", 1)
    with pytest.raises(ConfigError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"):
        prepare(meshes, tmp_path / "out", resolution=16, cluster="tcp://127.0.0.1:9")
