"""What planning takes DeepSpeed to keep is what it keeps."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.distributed.test_training import environment

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_bytes_a_parameter_under_each_stage() -> None:
    """Two ranks, after backward: see shapediff.engine.costs. Stage 1 exchanges at once where nothing is accumulated."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher, worker = Path(sys.executable).with_name("deepspeed"), Path(__file__).with_name("memory_worker.py")
    done = subprocess.run(
        [str(launcher), "--num_gpus", "2", "--master_port", str(port), str(worker)],
        capture_output=True,
        text=True,
        timeout=300,
        env=environment(),
    )
    assert done.returncode == 0, done.stderr[-4000:]
    (line,) = (line for line in done.stdout.splitlines() if "KEPT" in line)
    kept = json.loads(line.split("KEPT")[1])
    weights, gradients, moments, copy = 4, 4, 8, 4
    expected = {
        "0": weights + gradients + moments,
        "1": weights + (gradients + moments + copy) / 2,
        "2": weights + (gradients + moments + copy) / 2,
        "3": (weights + gradients + moments + copy) / 2,
    }
    # A little more is alive (under stage 3 what has fewer than 10^5 numbers stays gathered); a list of the weights' size would
    # be 12 % and more.
    assert kept == pytest.approx(expected, rel=0.08)
