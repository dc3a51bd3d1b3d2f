"""The command lines: run as files from another folder, exit status, what they say of damage."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from data_tools import _cli
from shapediff.data.report import ReportLine, summarize
from tests.data.data_helpers import write_dataset

TOOLS = Path(__file__).resolve().parents[2] / "data_tools"


def run_tool(name: str, *args: object, cwd: Path = TOOLS) -> subprocess.CompletedProcess[str]:
    # cwd: the folder whose inspect.py would hide the standard library's
    return subprocess.run(
        [sys.executable, str(TOOLS / f"{name}.py"), *map(str, args)],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        check=False,
    )


def test_import_then_strict(tmp_path: Path) -> None:
    root = tmp_path / "in"
    root.mkdir()
    np.save(root / "chair.npy", np.random.default_rng(0).random((3, 8, 8, 8)) < 0.3)
    (root / "bad.npy").write_bytes(b"nothing")
    done = run_tool("import_voxels", root, tmp_path / "out", "--turn", "chair=2")
    assert done.returncode == 0, done.stderr
    assert "3 shapes" in done.stdout and "skipped 1 (why" in done.stdout and "skipped bad.npy" in done.stdout
    assert run_tool("import_voxels", root, tmp_path / "out", "--strict").returncode == 1
    nothing = run_tool("import_voxels", tmp_path / "nowhere", tmp_path / "out")
    assert nothing.returncode == 2 and "is not a folder" in nothing.stdout


def test_verify_names_the_damaged_shard(tmp_path: Path) -> None:
    manifest = write_dataset(tmp_path)
    assert run_tool("verify", tmp_path).returncode == 0
    path = tmp_path / "shards" / manifest.shards[1].file
    content = bytearray(path.read_bytes())
    content[-40] ^= 1  # in the last row's grid: the labels come first
    path.write_bytes(content)
    found = run_tool("verify", tmp_path)
    assert found.returncode == 1 and path.name in found.stdout and "sha256" in found.stdout
    assert "class1/007.obj" in found.stdout
    (tmp_path / "manifest.json").unlink()
    gone = run_tool("verify", tmp_path)
    assert gone.returncode == 2 and "does not exist" in gone.stdout


def test_inspect_counts_and_draws(tmp_path: Path) -> None:
    pytest.importorskip("scipy", reason="the pictures need scipy")
    write_dataset(tmp_path, num=6, resolution=16)
    done = run_tool("inspect", tmp_path, "--sheets", tmp_path / "sheets", "--num", 2)
    assert done.returncode == 0, done.stderr
    assert "6 shapes, 16^3 occupancy" in done.stdout and "no two shapes have the same grid" in done.stdout
    assert sorted(path.name for path in (tmp_path / "sheets").iterdir()) == ["000_class0.png", "001_class1.png"]


def test_prepare(tmp_path: Path) -> None:
    import trimesh

    (tmp_path / "in" / "box").mkdir(parents=True)
    trimesh.creation.box().export(tmp_path / "in" / "box" / "[red]a.obj")
    (tmp_path / "in" / "box" / "bad.obj").write_text("")
    args = (tmp_path / "in", tmp_path / "out", "--resolution", 8, "--workers", 1)
    done = run_tool("prepare", *args)
    assert done.returncode == 0, done.stderr
    assert "1 shape (" in done.stdout and "skipped box/bad.obj" in done.stdout
    assert "skipped 1: cannot be read" in done.stdout or "skipped 1: holds no faces" in done.stdout
    assert run_tool("prepare", *args, "--strict").returncode == 1
    assert "reused 1" in run_tool("prepare", *args).stdout


def test_the_closing_table_names_classes_that_were_lost_and_kinds_of_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [ReportLine("a/0", "ok")]
    reasons = [
        "has 12 faces, more than the limit of 3; raise",
        "has 7 faces, more than the limit of 3; raise",
        "is flat: 1e-7 thick",
    ]
    lines += [ReportLine(f"b/{i}", "skipped", reason=reason) for i, reason in enumerate(reasons)]
    manifest = write_dataset(tmp_path, num=1, num_classes=1)
    summary = summarize(
        tmp_path, manifest, lines, seconds=1.0, class_of={line.source: line.source[0] for line in lines}
    )
    assert summary.reasons == {"has N faces, more than the limit of N": 2, "is flat": 1}
    assert summary.num_skipped_per_class == {"b": 3}
    monkeypatch.setattr(_cli, "console", Console(file=sys.stdout, width=200))
    _cli.print_summary(summary)
    rows = [line.split() for line in capsys.readouterr().out.replace("│", " ").splitlines()]
    assert ["0", "class0", "1", "0"] in rows and ["-", "b", "0", "3"] in rows
    assert ["skipped", "2:", "has", "N", "faces,", "more", "than", "the", "limit", "of", "N"] in rows


def test_progress_is_lines_where_no_terminal_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_cli, "LOG_SECONDS", 0.0)
    monkeypatch.setattr(_cli, "console", Console(file=sys.stdout, force_terminal=False, width=200))
    with _cli.progress_bar("meshes") as progress:
        progress(ReportLine("a", "ok"), 1, 3)
        progress(ReportLine("b", "skipped"), 2, 3)
    assert re.search(r"2 of 3 meshes, [\d.]+ meshes/s, 1 skipped, 0 minutes left", capsys.readouterr().out)
