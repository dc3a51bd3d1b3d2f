"""Preparation on a Dask cluster: a real scheduler and two workers on loopback, one of them killed on the way."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import trimesh

from shapediff.data.preparation import prepare
from shapediff.data.report import ReportLine
from shapediff.errors import ConfigError
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
    """(address, worker processes) of a scheduler on a free port of this machine."""
    processes = [start("scheduler", "--host", "127.0.0.1", "--port", "0", "--no-dashboard", cwd=folder)]
    try:
        address = next(
            found[0] for line in processes[0].stderr or () if (found := re.search(r"tcp://127\S+:\d+", line))
        )
        for _ in range(num_workers):
            worker = start("worker", address, "--no-nanny", "--nthreads", "1", "--no-dashboard", cwd=folder)
            processes.append(worker)
            next(line for line in worker.stderr or () if "Registered to" in line)
        yield address, processes[1:]
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
    with cluster(tmp_path, num_workers=2) as (address, workers):

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


def test_no_scheduler_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shapediff.data.cluster._CONNECT_SECONDS", 1)
    meshes = write_balls(tmp_path / "meshes", 1)
    with pytest.raises(ConfigError, match=r"no Dask scheduler answers at tcp://127\.0\.0\.1:9"):
        prepare(meshes, tmp_path / "out", resolution=16, cluster="tcp://127.0.0.1:9")
