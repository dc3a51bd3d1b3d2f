"""What a run lives through: steps that are not finite, ranks that are killed, launchers of several machines."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from tests.distributed.test_training import ROOT, SETTINGS, TIMEOUT, environment, losses, train

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_step_that_is_not_finite_leaves_no_trace_but_a_line(data: Path, tmp_path: Path, world_size: int) -> None:
    """Every ZeRO stage, with and without accumulation and offload, against plain torch: see skip_steps.py."""
    shared = {
        "WORLD_SIZE": world_size,
        "LOCAL_WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "distributed" / "skip_steps.py"), str(data), str(tmp_path)],
            env={
                **environment(),
                "PYTHONPATH": str(ROOT),
                **{k: str(v) for k, v in {**shared, "RANK": rank, "LOCAL_RANK": rank}.items()},
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=TIMEOUT)
        assert rank.returncode == 0, errors[-4000:]


LONGER = ["train.steps=30", "train.checkpoint_every=5"]
BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def straight(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, never stopped."""
    run = tmp_path_factory.mktemp("straight") / "run"
    train(data, run, *LONGER)
    return run


def script(data: Path, run: Path) -> list[str]:
    return [str(ROOT / "launch" / "train.py"), *SETTINGS, f"data.path={data}", f"run_dir={run}", *LONGER]


def start(command: list[str], folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment(), cwd=folder)


def kill_rank_1(launchers: list[subprocess.Popen[str]], run: Path) -> None:
    """SIGKILL to the process that trains as rank 1, once seven steps are done."""
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + TIMEOUT
    while not (metrics.exists() and metrics.read_text().count("\n") >= 7):
        assert time.monotonic() < deadline
        assert all(launcher.poll() is None for launcher in launchers)
        time.sleep(0.005)
    children = [child for launcher in launchers for child in psutil.Process(launcher.pid).children(recursive=True)]
    (rank_1,) = [child for child in children if child.environ().get("RANK") == "1"]
    rank_1.kill()


def test_a_lost_rank_ends_the_other_machines(data: Path, straight: Path, tmp_path: Path) -> None:
    """Two machines, as far as DeepSpeed's launcher knows, without ssh: neither launcher can see the other's ranks."""
    (tmp_path / "hostfile").write_text("node-a slots=1\nnode-b slots=1\n")
    run, port = tmp_path / "run", free_port()

    def both() -> list[subprocess.Popen[str]]:
        common = ["--no_ssh", "--hostfile", "hostfile", "--master_addr", "127.0.0.1", "--master_port", str(port)]
        return [
            start([str(BIN / "deepspeed"), *common, "--node_rank", str(node), *script(data, run)], tmp_path)
            for node in (0, 1)
        ]

    first = both()
    kill_rank_1(first, run)
    killed = time.monotonic()
    errors = first[0].communicate(timeout=TIMEOUT)[1]
    assert time.monotonic() - killed < 60
    assert "error: rank 1 (" in errors and "is gone: killed, or out of memory. The same command goes on" in errors
    assert "Traceback" not in errors
    assert all(launcher.wait(TIMEOUT) != 0 for launcher in first)
    assert len(losses(run)) < 30

    for launcher in both():
        errors = launcher.communicate(timeout=TIMEOUT)[1]
        assert launcher.returncode == 0, errors[-4000:]
    np.testing.assert_allclose(losses(run), losses(straight), rtol=1e-3)


def test_the_elastic_agent_starts_a_killed_run_again(data: Path, straight: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    agent = ["--nproc-per-node", "2", "--max-restarts", "20", "--master-port", str(free_port())]
    launcher = start([str(BIN / "torchrun"), *agent, *script(data, run)], tmp_path)
    kill_rank_1([launcher], run)
    errors = launcher.communicate(timeout=TIMEOUT)[1]
    assert launcher.returncode == 0, errors[-4000:]
    assert "resuming" in errors
    assert "error: rank 1 (" in errors
    np.testing.assert_allclose(losses(run), losses(straight), rtol=1e-3)
