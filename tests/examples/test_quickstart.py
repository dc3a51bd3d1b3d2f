"""The notebook runs from its first cell to its last, on a tiny checkpoint, and is kept without outputs."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
import trimesh
from nbclient import NotebookClient

from tests.conftest import ROOT
from tests.test_checkpoint import export

NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def test_the_notebook_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count is None and not cell.outputs for cell in code)
    export(tmp_path / "model")
    monkeypatch.setenv("SHAPEDIFF_CHECKPOINT", str(tmp_path / "model"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [out for cell in code for out in cell.outputs if "image/png" in out.get("data", {})]
    assert len(pictures) == 2
    written = sorted(path.name for path in (tmp_path / "samples" / "notebook").glob("*.glb"))
    assert written == ["chair_0000.glb", "chair_0001.glb", "chair_0002.glb", "chair_0003.glb", "mirrored.glb"]
    assert trimesh.load(tmp_path / "samples" / "notebook" / "mirrored.glb", force="mesh").is_watertight
