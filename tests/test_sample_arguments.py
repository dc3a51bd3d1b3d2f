"""Options that would do nothing are refused by name, whatever front end they come from; defaults never are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shapediff import sample as cli
from shapediff.errors import ConfigError
from shapediff.geometry.printable import MeshOptions
from shapediff.methods import METHODS, SampleConfig
from shapediff.methods.base import COMMON_SETTINGS, STEP_SETTINGS, TOKEN_SETTINGS
from shapediff.pipeline import ShapePipeline
from tests.test_checkpoint import export, export_of_tokens

OF_STEPS: dict[str, Any] = {
    "num_steps": 3,
    "sampler": "heun",
    "eta": 0.5,
    "spacing": "leading",
    "guidance_interval": (0.2, 0.8),
    "guidance_rescale": 0.5,
    "split_batch": True,
}
OF_TOKENS: dict[str, Any] = {"temperature": 0.5, "top_k": 3, "top_p": 0.9}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small export of each kind, by its kind."""
    folder = tmp_path_factory.mktemp("models")
    export(folder / "steps")
    export_of_tokens(folder / "tokens")
    return {"steps": folder / "steps", "tokens": folder / "tokens"}


def test_every_setting_of_sampling_is_of_some_method() -> None:
    """And no table names one that there is not."""
    fields = set(SampleConfig.__dataclass_fields__)
    methods = [config().build(resolution=8, num_classes=1) for config in METHODS.values()]
    assert set().union(COMMON_SETTINGS, *(method.sampling_settings for method in methods)) == fields
    assert fields == STEP_SETTINGS | TOKEN_SETTINGS | COMMON_SETTINGS | {"guidance_scale"}
    assert set(OF_STEPS) == STEP_SETTINGS and set(OF_TOKENS) == TOKEN_SETTINGS


@pytest.mark.parametrize("kind", ["steps", "tokens"])
def test_a_pipeline_takes_what_its_method_uses_and_names_what_it_does_not(models: dict[str, Path], kind: str) -> None:
    pipeline = ShapePipeline.from_pretrained(models[kind])
    own, others = (OF_STEPS, OF_TOKENS) if kind == "steps" else (OF_TOKENS, OF_STEPS)
    for name, value in {**own, "guidance_scale": 2.0}.items():
        more = {"sampler": "ddim"} if name == "eta" else {}
        used = pipeline.settings(**{name: value, **more})
        assert used[name] == (list(value) if isinstance(value, tuple) else value)
        assert not set(used) & set(others)  # what does nothing identifies nothing
    for name, value in others.items():
        owner = "autoregressive models" if kind == "steps" else "diffusion models"
        with pytest.raises(ConfigError, match=rf"{name} \(--.* is for {owner} .* it takes .*guidance_scale"):
            pipeline.settings(**{name: value, **({"sampler": "ddim"} if name == "eta" else {})})
        with pytest.raises(ConfigError, match=name):  # also where the value is the default
            pipeline(1, **{name: SampleConfig.__dataclass_fields__[name].default})


@pytest.mark.parametrize(
    ("kind", "arguments", "reason"),
    [
        ("tokens", ["--steps", "20"], "num_steps (--steps) is for diffusion models"),
        ("tokens", ["--sampler", "heun"], "sampler (--sampler) is for diffusion models"),
        ("tokens", ["--split-batch"], "split_batch (--split-batch) is for diffusion models"),
        ("tokens", ["--steps", "20", "--eta", "0.5"], "eta (--eta), num_steps (--steps) is for diffusion models"),
        ("steps", ["--temperature", "1"], "temperature (--temperature) is for autoregressive models"),
        ("steps", ["--top-k", "3"], "top_k (--top-k) is for autoregressive models"),
        ("steps", ["--strength", "0.5"], "--strength belongs to --vary"),
        ("steps", ["--complete", "a.obj", "--strength", "0.5"], "--strength belongs to --vary"),
        ("steps", ["--resamples", "4"], "--resamples belongs to --complete"),
        ("steps", ["--vary", "a.obj", "--keep-box", *"000111"], "--keep-box belongs to --complete"),
        ("steps", ["--as-placed"], "--as-placed belongs to --complete or --vary or --interpolate"),
        ("steps", ["--input-up", "y"], "--input-up belongs to --complete or --vary or --interpolate"),
        (
            "steps",
            ["--format", "npz", "--height", "12cm", "--smoothing", "3"],
            "--smoothing, --height would do nothing",
        ),
        ("steps", ["--format", "schem", "--max-faces", "90"], "--max-faces would do nothing: .schem holds voxels"),
        ("steps", ["--format", "vox", "--up", "z", "--preview"], "--up would do nothing"),
    ],
)
def test_the_command_line_refuses_what_would_do_nothing(
    models: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kind: str,
    arguments: list[str],
    reason: str,
) -> None:
    out = tmp_path / "out"
    assert cli.main(["--checkpoint", str(models[kind]), "--class", "chair", "--out", str(out), *arguments]) == 2
    assert capsys.readouterr().err.startswith(f"error: {reason}")
    assert not out.exists()


def test_guidance_needs_a_class(models: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--checkpoint", str(models["steps"]), "--guidance", "3"]) == 2
    assert "--guidance would do nothing: it guides towards a class" in capsys.readouterr().err


def test_voxels_have_what_cleans_them_and_their_pictures_a_surface(models: dict[str, Path], tmp_path: Path) -> None:
    base = ["--checkpoint", str(models["steps"]), "--class", "chair", "--num", "1", "--steps", "2", "--format", "npz"]
    assert cli.main([*base, "--keep-cavities", "--min-part", "0.2", "--out", str(tmp_path / "clean")]) == 0
    assert cli.main([*base, "--surface", "blocks", "--preview", "--out", str(tmp_path / "drawn")]) == 0
    assert (tmp_path / "drawn" / "preview.png").exists()


def test_saving_voxels_refuses_a_size(models: dict[str, Path], tmp_path: Path) -> None:
    shapes = ShapePipeline.from_pretrained(models["steps"])(1, num_steps=1)
    with pytest.raises(ConfigError, match="--height would do nothing: .binvox holds".replace(".", r"\.")):
        shapes.save(tmp_path, format="binvox", options=MeshOptions(height=0.1))
    assert not list(tmp_path.iterdir())
