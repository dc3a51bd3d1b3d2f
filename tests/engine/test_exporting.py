"""An export from saved states is the one that the run itself writes; with many ranks: tests/distributed/test_state.py."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shapediff import export as command
from shapediff.checkpoint import ExportConfig, read_export, write_export
from shapediff.engine.ema import Ema
from shapediff.engine.exporting import MODEL_FILE, duration, export_run, record_model, trained
from shapediff.engine.shares import Shares
from shapediff.engine.state import Progress, save_state
from shapediff.errors import CheckpointError
from tests.engine.engines import WholeEngine
from tests.test_checkpoint import export as tiny_export


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of three steps, each saved, with what it would have exported after step N as RUN/after-N."""
    folder = tmp_path / "run"
    config, _ = tiny_export(tmp_path / "tiny")
    config = replace(config, training={"data": "somewhere", "seed": 0})
    record_model(folder, config)
    (folder / "config.json").write_text(json.dumps({"train": {"export_dtype": "bfloat16"}}))
    networks = config.build_method().build_networks(config.model)
    engines = {name: WholeEngine(network) for name, network in networks.items()}
    shares = Shares(engines)
    ema = Ema(shares, decay=0.9)
    for step in (1, 2, 3):
        for engine in engines.values():
            engine.step()
        ema.update()
        progress = Progress(step, samples_seen=8 * step, seconds=40.7 * step)
        save_state(folder / "state", progress, shares, ema, keep=3)
        _write_own(folder / f"after-{step}", config, progress, ema)
    return folder


def _write_own(path: Path, config: ExportConfig, now: Progress, ema: Ema) -> None:
    facts = trained(config, step=now.step, samples_seen=now.samples_seen, seconds=now.seconds)
    write_export(path, facts, ema.gathered(), dtype=torch.bfloat16)


def test_it_is_what_the_run_exports(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(run)]) == 0
    assert f"exported to {run / 'export'}" in capsys.readouterr().out
    assert files(run / "export") == files(run / "after-3")
    assert command.main([str(run), "--out", str(tmp_path / "out"), "--step", "2"]) == 0
    assert files(tmp_path / "out") == files(run / "after-2")
    assert dict(read_export(tmp_path / "out").config.training)["samples_seen"] == 16


def test_a_damaged_state_is_passed_over_and_said(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    newest = run / "state" / "step-00000003" / "rank-00000.safetensors"
    data = bytearray(newest.read_bytes())
    data[-1] ^= 1
    newest.write_bytes(bytes(data))
    assert files(export_run(run)) == files(run / "after-2")
    assert "is not what was written" in caplog.text
    with pytest.raises(CheckpointError, match=r"no state .* is intact: .*is not what was written"):
        export_run(run, step=3)


def test_errors_say_what_there_is(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main([str(run), "--step", "7"]) == 2
    assert "there are: 1, 2, 3" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="is no run"):
        export_run(tmp_path / "tiny")
    (run / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match="does not say"):
        export_run(run)
    (run / MODEL_FILE).unlink()
    with pytest.raises(CheckpointError, match="resume the run once"):
        export_run(run)


def test_duration() -> None:
    assert [duration(s) for s in (40, 300, 3900)] == ["40 s", "5 min", "1 h 05 min"]
