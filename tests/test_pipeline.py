"""The pipeline and the command line on a small random model: sample i is sample i, errors say what there is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import trimesh

from shapediff import sample as cli
from shapediff.errors import CheckpointError, ConfigError
from shapediff.pipeline import ShapePipeline
from tests.test_checkpoint import MODELS, export


@pytest.fixture(scope="module", params=MODELS)
def pipeline(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ShapePipeline:
    path = tmp_path_factory.mktemp("export") / "a"
    export(path, MODELS[request.param])
    return ShapePipeline.from_pretrained(path)


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_sample_i_is_the_same_whatever_the_batch(pipeline: ShapePipeline, precision: str) -> None:
    options = {"label": "chair", "seed": 5, "precision": precision, "num_steps": 4}
    five = pipeline(5, batch_size=5, **options)  # type: ignore[arg-type]
    for num, batch_size in ((3, 3), (3, 1), (5, 2)):
        other = pipeline(num, batch_size=batch_size, **options)  # type: ignore[arg-type]
        assert other.seeds == five.seeds[:num]
        assert torch.equal(other.voxels, five.voxels[:num])


def test_seed_class_and_settings_matter(pipeline: ShapePipeline) -> None:
    base = pipeline(1, label="chair", num_steps=4).voxels
    for change in ({"seed": 1}, {"label": "椅子"}, {"num_steps": 5}, {"guidance_scale": 1.0}, {"label": None}):
        other = pipeline(1, **{"label": "chair", "num_steps": 4, **change}).voxels  # type: ignore[arg-type]
        assert not torch.equal(base, other)
    assert base.shape == (1, 8, 8, 8)
    assert base.abs().max() <= 1


def test_unconditional_is_guidance_zero(pipeline: ShapePipeline) -> None:
    without = pipeline(1, label=None, num_steps=3, precision="float32").voxels
    zero = pipeline(1, label="chair", num_steps=3, guidance_scale=0.0, precision="float32").voxels
    assert torch.equal(without, zero)


def test_refuses_by_saying_what_there_is(pipeline: ShapePipeline) -> None:
    with pytest.raises(ConfigError, match="class 'chiar' is unknown; did you mean 'chair'"):
        pipeline(1, label="chiar")
    with pytest.raises(ConfigError, match="num_stepz"):
        pipeline(1, num_stepz=3)
    with pytest.raises(ConfigError, match="at least 1"):
        pipeline(0)
    with pytest.raises(ConfigError, match="sampler"):
        pipeline(1, sampler="euler")
    with pytest.raises(ConfigError, match=r"num_steps=1001 is more .* use 1000 or fewer"):
        pipeline(1, num_steps=1001)
    with pytest.raises(ConfigError, match="mesh format 'fbx' is unknown"):
        pipeline(1, num_steps=1).save(Path("nowhere"), format="fbx")


def test_command_line_writes_meshes_a_manifest_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(tmp_path / "model"), "--steps", "3", "--out", str(out)]
    pictures = ["--preview", "--turntable", "--html"]
    assert (
        cli.main([*arguments, *pictures, "--class", "all", "--num", "2", "--guidance", "3", "--batch-size", "1"]) == 0
    )
    lines = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["shapes"]
    assert [line["name"] for line in lines] == ["chair_0000", "chair_0001", "椅子_0000", "椅子_0001"]
    for line in lines:
        assert line["settings"]["guidance_scale"] == 3
        mesh = trimesh.load(out / line["file"], force="mesh")
        assert mesh.is_watertight
        assert mesh.volume > 0
    assert (out / "preview.png").read_bytes().startswith(b"\x89PNG")
    assert (out / "turntable.gif").read_bytes().startswith(b"GIF89a")
    page = (out / "shapes.html").read_text(encoding="utf-8")
    assert page.count("<figure ") == 4 and '<h2 id="group-2">椅子</h2>' in page
    assert "4 meshes" in capsys.readouterr().out
    # The same again as glb, fewer of them: the same shapes.
    before = (out / "chair_0000.obj").read_bytes()
    assert cli.main([*arguments, "--class", "chair", "--num", "1"]) == 0
    assert (out / "chair_0000.obj").read_bytes() == before


@pytest.mark.parametrize("spacing", ["leading", "linspace"])
def test_command_line_passes_the_spacing_on(tmp_path: Path, spacing: str) -> None:
    export(tmp_path / "model")
    pipeline = ShapePipeline.from_pretrained(tmp_path / "model")
    expected = pipeline(1, label="chair", num_steps=3, spacing=spacing)
    arguments = ["--checkpoint", str(tmp_path / "model"), "--class", "chair", "--num", "1", "--steps", "3"]
    assert cli.main([*arguments, "--out", str(tmp_path / "out"), "--device", "cpu", "--spacing", spacing]) == 0
    (line,) = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))["shapes"]
    assert line["settings"]["spacing"] == spacing
    assert line["volume"] == pytest.approx(float(expected.mesh(0).volume), rel=1e-6)
    assert not torch.equal(expected.voxels, pipeline(1, label="chair", num_steps=3).voxels)


@pytest.mark.parametrize("sampler", ["dpm_solver", "heun"])
def test_command_line_passes_samplers_and_guidance_on(tmp_path: Path, sampler: str) -> None:
    export(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(tmp_path / "model"), "--class", "chair", "--num", "1", "--steps", "3"]
    guidance = ["--guidance-interval", "0.2", "0.9", "--guidance-rescale", "0.5", "--split-batch"]
    assert cli.main([*arguments, "--out", str(out), "--sampler", sampler, *guidance]) == 0
    (line,) = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["shapes"]
    settings = line["settings"]
    assert settings["sampler"] == sampler
    assert settings["guidance_interval"] == [0.2, 0.9]
    assert settings["guidance_rescale"] == 0.5
    assert settings["split_batch"] is True


def test_command_line_errors_are_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    export(tmp_path / "model")
    assert cli.main(["--checkpoint", str(tmp_path / "model"), "--class", "sofa"]) == 2
    assert "class 'sofa' is unknown" in capsys.readouterr().err
    assert cli.main(["--checkpoint", str(tmp_path / "model"), "--guidance-interval", "0.9", "0.2"]) == 2
    assert "guidance_interval=(0.9, 0.2)" in capsys.readouterr().err
    assert cli.main(["--checkpoint", str(tmp_path / "model"), "--sampler", "heun", "--eta", "0.5"]) == 2
    assert "belongs to the sampler ddim" in capsys.readouterr().err
    assert cli.main(["--checkpoint", str(tmp_path / "model"), "--steps", "2000"]) == 2
    assert capsys.readouterr().err.startswith("error: num_steps=2000 is more than the 1000 timesteps")
    assert cli.main(["--checkpoint", str(tmp_path / "none"), "--class", "chair"]) == 2
    assert "no checkpoint at" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert cli.main(["--class", "chair"]) == 2
    assert "make quickstart" in capsys.readouterr().err
    with pytest.raises(CheckpointError):
        cli.newest_export(tmp_path)
