"""What a run lives through: steps that are not finite, ranks that are killed, launchers of several machines."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.test_training import ROOT, TIMEOUT, data, environment

__all__ = ["data"]

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
