"""The layers hold: a file imports from lower layers and from its own package, never upwards, never sideways."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# Base modules stand under everything. Otherwise a package or module may import what stands in a row above its own.
BASE = {"errors", "files", "config_io", "hardware", "ranks", "batching", "gallery"}
ROWS = [
    {"grid", "geometry"},
    {"data", "diffusion", "models", "evaluation"},
    {"methods"},
    {"checkpoint", "hub", "labels", "shapes", "pipeline", "editing"},
    {"engine"},
    {"progress", "writing", "held_out"},
    {"sample", "sample_arguments", "evaluate", "app", "plan", "export"},
]
# Of one line: checkpoint stands under hub and editing, labels and shapes under pipeline; diffusion is torch alone.
ALLOWED_SIDEWAYS = {
    ("hub", "checkpoint"),
    ("editing", "checkpoint"),
    ("sample", "sample_arguments"),
    *(("pipeline", under) for under in ("checkpoint", "hub", "labels", "shapes")),
}
FORBIDDEN = {"diffusion": {"grid", "geometry"}, "models": {"geometry"}}
ONLY_IN = {
    "deepspeed": {"engine"},
    "hydra": set(),
    "omegaconf": set(),
    "gradio": {"app"},
    "huggingface_hub": {"hub"},
    "argparse": {"sample", "sample_arguments", "evaluate", "plan", "export", "app"},
}


def violations(home: str, source: str) -> Iterator[str]:
    """What a file of package (or module) `home` imports, or calls, against the rules."""
    for node in ast.walk(ast.parse(source)):
        for module in _imported(node):
            top, *rest = module.split(".")
            if top in ONLY_IN and home not in ONLY_IN[top]:
                yield f"{home} imports {top}"
            if top in ("pickle", "marshal", "shelve"):
                yield f"{home} imports {top}"
            if top == "shapediff" and rest and not _may_import(home, rest[0]):
                yield f"{home} imports {rest[0]}"
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name == "print" and home not in ROWS[-1]:
                yield f"{home} calls print"
            keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
            if name == "torch.load" and keywords.get("weights_only") != "True":
                yield f"{home} calls torch.load without weights_only=True"


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom) and node.module:
        if node.module == "shapediff":
            return [f"shapediff.{alias.name}" for alias in node.names]
        return [node.module]
    return []


def _row(name: str) -> int:
    return next((i for i, row in enumerate(ROWS) if name in row), -1)


def _may_import(home: str, other: str) -> bool:
    if other == home or other in BASE:
        return True
    if home in BASE or other in FORBIDDEN.get(home, set()):
        return False
    return (home, other) in ALLOWED_SIDEWAYS or 0 <= _row(other) < _row(home)


def _files() -> list[Path]:
    return sorted(
        p for p in (ROOT / "shapediff").rglob("*.py") if p.name != "__init__.py" or p.parent.name != "shapediff"
    )


@pytest.mark.parametrize("path", _files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_layers_hold(path: Path) -> None:
    home = path.relative_to(ROOT / "shapediff").parts[0].removesuffix(".py")
    assert home in BASE or _row(home) >= 0, f"{home} has no layer yet; give it one here"
    assert list(violations(home, path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("home", "source"),
    [
        ("grid", "from shapediff.geometry.mesh import load_mesh"),
        ("sample", "import gradio"),
        ("diffusion", "def f():\n    from shapediff.grid import morton"),
        ("models", "from shapediff.diffusion.schedule import NoiseSchedule"),
        ("methods", "import shapediff.pipeline"),
        ("pipeline", "from shapediff import engine"),
        ("checkpoint", "from shapediff.pipeline import Shapes"),
        ("errors", "from shapediff.grid import morton"),
        ("pipeline", "import deepspeed"),
        ("engine", "from hydra import main"),
        ("data", "import pickle"),
        ("data", "print(1)"),
        ("engine", "torch.load(path)"),
    ],
)
def test_a_planted_violation_is_found(home: str, source: str) -> None:
    assert len(list(violations(home, source))) == 1


HEAVY = ("deepspeed", "hydra", "gradio", "open3d", "matplotlib", "trimesh", "numba", "skimage", "huggingface_hub")


@pytest.mark.parametrize(
    "module", ["shapediff.sample", "shapediff.export", "shapediff.data.dataset", "shapediff.app.studio"]
)
def test_imports_are_light(module: str) -> None:
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_is_there() -> None:
    import shapediff

    for name in shapediff.__all__:
        assert callable(getattr(shapediff, name))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = shapediff.nothing
