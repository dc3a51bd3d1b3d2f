"""Exports: what is written comes back exactly; what is damaged, foreign or hostile is refused by name."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from shapediff.checkpoint import CONFIG_FILE, WEIGHTS_FILE, ExportConfig, find_export, read_export, write_export
from shapediff.errors import CheckpointError
from shapediff.methods import OctreeAutoregressionConfig, SampleConfig, VoxelDiffusionConfig
from shapediff.models import DiT3DConfig, ModelConfig, OctreeTransformerConfig, UNet3DConfig

MODELS: dict[str, ModelConfig] = {
    "unet3d": UNet3DConfig(width=8, width_multipliers=(1, 2), num_res_blocks=1, attention_levels=()),
    "dit3d": DiT3DConfig(hidden_size=12, depth=1, num_heads=2),
}


def export(path: Path, model: ModelConfig | None = None) -> tuple[ExportConfig, dict[str, dict[str, torch.Tensor]]]:
    """Write a small export with random weights."""
    config = ExportConfig(
        resolution=8,
        field="occupancy",
        classes=("chair", "椅子"),
        method=VoxelDiffusionConfig(prediction="v"),
        model=model or MODELS["unet3d"],
        sampling=SampleConfig(num_steps=7),
        training={"steps": 3},
    )
    torch.manual_seed(0)
    networks = config.build_method().build_networks(config.model)
    weights = {name: {k: torch.randn_like(v) for k, v in n.state_dict().items()} for name, n in networks.items()}
    write_export(path, config, weights, dtype=torch.float32)
    return config, weights


def export_of_tokens(path: Path) -> None:
    """Write a small export of an autoregressive model, with random weights."""
    model = OctreeTransformerConfig(hidden_size=12, depth=1, num_heads=1)
    config = ExportConfig(8, "occupancy", ("chair", "cup"), OctreeAutoregressionConfig(), model)
    torch.manual_seed(0)
    networks = config.build_method().build_networks(model)
    weights = {name: {k: torch.randn_like(v) for k, v in n.state_dict().items()} for name, n in networks.items()}
    write_export(path, config, weights, dtype=torch.float32)


@pytest.mark.parametrize("name", MODELS)
def test_round_trip(tmp_path: Path, name: str) -> None:
    config, weights = export(tmp_path / "run" / "export", MODELS[name])
    for path in (tmp_path / "run", tmp_path / "run" / "export"):
        read = read_export(path)
        assert read.config == config
        for network, state in weights.items():
            found = read.networks[network].state_dict()
            assert found.keys() == state.keys()
            assert all(torch.equal(found[key], state[key]) for key in state)
            assert not read.networks[network].training
    assert "--class chair" in (tmp_path / "run" / "export" / "README.md").read_text()


def test_bfloat16_halves_the_file_and_keeps_8_bits(tmp_path: Path) -> None:
    config, weights = export(tmp_path / "a")
    write_export(tmp_path / "b", config, weights, dtype=torch.bfloat16)
    sizes = [(tmp_path / name / WEIGHTS_FILE).stat().st_size for name in "ab"]
    assert sizes[1] < 0.6 * sizes[0]
    found = read_export(tmp_path / "b").networks["denoiser"].state_dict()
    for key, value in weights["denoiser"].items():
        torch.testing.assert_close(found[key], value, rtol=2**-8, atol=0)


def test_a_failed_write_leaves_the_old_export(tmp_path: Path) -> None:
    config, weights = export(tmp_path / "a")
    with pytest.raises(AttributeError):
        write_export(tmp_path / "a", config, {"denoiser": {"x": None}}, dtype=torch.float32)  # type: ignore[dict-item]
    assert torch.equal(
        read_export(tmp_path / "a").networks["denoiser"].state_dict()["conv_in.bias"],
        weights["denoiser"]["conv_in.bias"],
    )
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def edit(**changes: object) -> Callable[[Path], None]:
    """Change entries of config.json."""

    def apply(path: Path) -> None:
        config = json.loads((path / CONFIG_FILE).read_text())
        (path / CONFIG_FILE).write_text(json.dumps({**config, **changes}))

    return apply


HARM: dict[str, tuple[Callable[[Path], None], str]] = {
    "not json": (lambda p: (p / CONFIG_FILE).write_text("{") and None, "cannot be read"),
    "deep json": (lambda p: (p / CONFIG_FILE).write_text("[" * 100_000) and None, "cannot be read"),
    "huge json": (lambda p: (p / CONFIG_FILE).write_text(" " * 2_000_000) and None, "larger than"),
    "foreign": (edit(format="other"), "not a shapediff export"),
    "newer": (edit(format_version=99), "format version 1"),
    "odd resolution": (edit(resolution=12), "power of two"),
    "vast resolution": (edit(resolution=2**40), "power of two"),
    "class outside": (edit(classes=["../x"]), "cannot be the name of a file"),
    "no classes": (edit(classes=[]), "classes"),
    "code": (edit(model={"name": "os.system"}), "'os.system' is unknown"),
    "target": (edit(model={"name": "unet3d", "_target_": "os.system"}), "_target_"),
    "other model": (edit(model={"name": "unet3d", "width": 16}), "does not fit"),
    "impossible model": (edit(model={"name": "unet3d", "width_multipliers": [1] * 9}), "not divisible"),
    "patches of nothing": (edit(model={"name": "unet3d", "patch_size": 0}), "patch_size=0 must be a power of two"),
    "tokens of nothing": (edit(model={"name": "dit3d", "patch_size": 0}), "patch_size=0 must be a power of two"),
    "cells of nothing": (edit(model={"name": "vae3d", "patch_size": -2}), "patch_size=-2 must be a power of two"),
    "attention of nobody": (edit(model={"name": "unet3d", "num_heads": 0}), "num_heads must be positive"),
    "no weights left": (lambda p: (p / WEIGHTS_FILE).write_bytes(b"") and None, "damaged"),
    "truncated": (lambda p: (p / WEIGHTS_FILE).write_bytes((p / WEIGHTS_FILE).read_bytes()[:-100]) and None, "damaged"),
    "long header": (lambda p: (p / WEIGHTS_FILE).write_bytes(b"\xff" * 64) and None, "damaged"),
}


@pytest.mark.parametrize("harm", HARM)
def test_harm_is_refused_by_name(tmp_path: Path, harm: str) -> None:
    export(tmp_path / "a")
    apply, message = HARM[harm]
    apply(tmp_path / "a")
    with pytest.raises(CheckpointError, match=message):
        read_export(tmp_path / "a")


def test_says_what_is_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no such file"):
        find_export(tmp_path / "nothing")
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(CheckpointError, match=r"found: notes\.txt"):
        find_export(tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_reading_imports_no_compiler(tmp_path: Path, name: str) -> None:
    """Random numbers on the meta device import torch._dynamo, which takes a second and a half of a cold start."""
    export(tmp_path, MODELS[name])
    code = (
        "import sys, torch; from shapediff.checkpoint import read_export; "
        f"networks = read_export({str(tmp_path)!r}).networks; assert 'torch._dynamo' not in sys.modules; "
        "assert all(bool(p.isfinite().all()) for p in networks['denoiser'].parameters())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
