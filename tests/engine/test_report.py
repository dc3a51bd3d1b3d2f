"""What a run leaves behind: how it was started, what it waited for, and what Weights & Biases is told."""

from __future__ import annotations

import importlib.machinery
import json
import mmap
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shapediff.engine import report
from shapediff.engine.config import LoopConfig, TrainConfig
from shapediff.engine.report import Reporter, record_start
from shapediff.engine.wandb_run import WandbRun, require_wandb
from shapediff.errors import ConfigError
from shapediff.hardware import memory_in_use


def test_a_start_is_recorded_without_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret")
    monkeypatch.setattr(sys, "argv", ["launch/train.py", "run_dir=runs/a b"])
    for _ in range(2):
        record_start(tmp_path, TrainConfig().to_dict(), device=torch.device("cpu"), world_size=3)
    first, second = (json.loads(line) for line in (tmp_path / "started.jsonl").read_text().splitlines())
    assert first.keys() == second.keys()
    assert {"time", "command", "python", "git_revision", "host"} < first.keys()
    assert first["command"].endswith("launch/train.py 'run_dir=runs/a b'")
    assert first["packages"]["torch"] == torch.__version__
    assert (first["ranks"], first["device"], first["threads"]) == (3, "cpu", torch.get_num_threads())
    assert TrainConfig.from_dict(json.loads((tmp_path / "config.json").read_text())) == TrainConfig()
    assert not any("a-secret" in path.read_text() for path in tmp_path.iterdir())


def test_the_share_of_time_that_was_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(report.time, "monotonic", lambda: now)
    reporter = Reporter(tmp_path, LoopConfig(steps=10), first_step=0)
    now = 110.0
    assert reporter.share_of_time(1.0) == pytest.approx(0.1)  # 1 s of 10
    now = 114.0
    assert reporter.share_of_time(3.0) == pytest.approx(0.5)  # 2 s of 4
    reporter.close()


def test_memory_in_use_grows_with_what_is_taken() -> None:
    num_bytes = 64 * 2**20
    before = memory_in_use(torch.device("cpu"))
    with mmap.mmap(-1, num_bytes) as taken:  # fresh pages: an allocator may hand out those of a tensor that is gone
        taken.write(b"\1" * num_bytes)
        assert memory_in_use(torch.device("cpu")) - before == pytest.approx(num_bytes, rel=0.1)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """A stand-in for the package, and the list of what it is called with."""
    calls: list[tuple[Any, ...]] = []

    class Run:
        def log(self, values: dict[str, Any], *, step: int) -> None:
            calls.append(("log", step, values))

        def finish(self) -> None:
            calls.append(("finish",))

    def init(**settings: Any) -> Run:
        calls.append(("init", settings))
        return Run()

    module = types.ModuleType("wandb")
    module.__spec__ = importlib.machinery.ModuleSpec("wandb", None)
    module.init, module.Image = init, lambda pixels: ("image", pixels.shape)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    return calls


def test_weights_and_biases_is_told_what_tensorboard_is(tmp_path: Path, wandb: list[tuple[Any, ...]]) -> None:
    run = tmp_path / "chairs"
    run.mkdir()
    require_wandb("shapes")
    for first_step in (0, 3):
        board = WandbRun("shapes", run, {"run_dir": "runs/chairs"})
        reporter = Reporter(run, LoopConfig(steps=10), first_step=first_step, wandb=board)
        reporter.metrics(3, {"loss": 0.5, "error_by_timestep": [0.25, None], "error_by_class": {"chair": 0.75}})
        reporter.samples(3, np.full((1, 4, 4, 4), -1.0), ["chair"], columns=1)
        reporter.close()
    (_, settings), numbers, (*_, picture), finish, (_, resumed), *_ = wandb
    assert settings == resumed  # the same id: resumed, not begun again
    assert {**settings, "id": None} == {
        "project": "shapes",
        "name": "chairs",
        "id": None,
        "resume": "allow",
        "dir": str(run),
        "config": {"run_dir": "runs/chairs"},
    }
    assert numbers == ("log", 3, {"loss": 0.5, "error_by_timestep/0": 0.25, "error_by_class/chair": 0.75})
    assert picture["samples"][0] == "image" and finish == ("finish",)


def test_without_the_package_it_is_one_clear_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"train.wandb=shapes needs the package wandb: pip install wandb"):
        require_wandb("shapes")
    require_wandb(None)
