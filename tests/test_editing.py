"""Edits through the pipeline and the command line, on a small random model."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh

from shapediff import sample as cli
from shapediff.checkpoint import ExportConfig
from shapediff.diffusion.editing import Edit
from shapediff.diffusion.samplers import SAMPLERS
from shapediff.editing import box_mask, parse_label, read_voxels
from shapediff.errors import ConfigError, DataError, MeshError
from shapediff.grid.morton import dense_to_morton
from shapediff.methods import VoxelDiffusionConfig
from shapediff.models import UNet3DConfig
from shapediff.pipeline import ShapePipeline
from tests.test_checkpoint import export, export_of_tokens

OTHER = "椅子"
FEW = {"num_steps": 3, "precision": "float32"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("export") / "a"
    export(path)
    return path


@pytest.fixture(scope="module")
def pipeline(model: Path) -> ShapePipeline:
    return ShapePipeline.from_pretrained(model)


@pytest.fixture(scope="module")
def voxels() -> torch.Tensor:
    return torch.randn(8, 8, 8, generator=torch.Generator().manual_seed(0)).sign()


def _half() -> torch.Tensor:
    return torch.arange(8)[:, None, None].expand(8, 8, 8) < 4


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_completion_keeps_what_is_given(
    pipeline: ShapePipeline, voxels: torch.Tensor, sampler: str, precision: str
) -> None:
    keep = _half()
    shapes = pipeline.complete(voxels, keep, 2, label="chair", sampler=sampler, num_steps=3, precision=precision)
    assert torch.equal(shapes.voxels[:, keep], voxels[keep].expand(2, -1))
    assert not torch.equal(shapes.voxels[0], shapes.voxels[1])
    assert shapes.settings["edit"] == {"name": "complete", "kept_voxels": 256, "num_resamples": 4}
    assert shapes.names == ("chair_complete_0000", "chair_complete_0001")


def test_completing_half_with_a_mirror_gives_the_other_half(pipeline: ShapePipeline, voxels: torch.Tensor) -> None:
    found = pipeline.complete(voxels, _half(), mirror="x", **FEW).voxels[0]
    assert torch.equal(found, torch.where(_half(), voxels, voxels.flip(0)))
    with pytest.raises(ConfigError, match=r"not symmetric: \d+ pairs of voxels differ"):
        pipeline.complete(voxels, torch.ones(8, 8, 8, dtype=torch.bool), mirror="x", **FEW)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_variations_go_from_the_input_to_a_fresh_sample(
    pipeline: ShapePipeline, voxels: torch.Tensor, sampler: str
) -> None:
    options: dict[str, Any] = {"label": "chair", "seed": 3, "sampler": sampler, **FEW}
    assert torch.equal(pipeline.vary(voxels, 0.0, 2, **options).voxels, voxels.expand(2, 8, 8, 8))
    assert torch.equal(pipeline.vary(voxels, 1.0, 2, **options).voxels, pipeline(2, **options).voxels)
    two = pipeline.vary(voxels, 0.5, 2, **options).voxels
    assert not torch.equal(two[0], two[1])
    assert torch.equal(two[1], pipeline.vary(voxels, 0.5, 3, batch_size=2, **options).voxels[1])


@pytest.mark.parametrize("axis", ["x", "y", "z"])
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_mirrored_shapes_are_symmetric_to_the_voxel(pipeline: ShapePipeline, axis: str, sampler: str) -> None:
    shapes = pipeline(2, label="chair", mirror=axis, sampler=sampler, **FEW)
    assert torch.equal(shapes.voxels, shapes.voxels.flip(1 + "xyz".index(axis)))
    assert shapes.settings["mirror"] == axis
    assert not torch.equal(shapes.voxels, shapes.voxels.flip(1 + (1 + "xyz".index(axis)) % 3))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_between_seeds_and_classes_the_ends_are_their_samples(pipeline: ShapePipeline, sampler: str) -> None:
    options: dict[str, Any] = {"sampler": sampler, **FEW}
    seeds = pipeline.interpolate(3, 5, 3, label="chair", **options).voxels
    for place, seed in ((0, 3), (2, 5)):
        assert torch.equal(seeds[place], pipeline(1, label="chair", seed=seed, **options).voxels[0])
    classes = pipeline.interpolate("chair", OTHER, 3, seed=4, **options)
    for place, label in ((0, "chair"), (2, OTHER)):
        assert torch.equal(classes.voxels[place], pipeline(1, label=label, seed=4, **options).voxels[0])
    assert classes.classes == ("chair", f"chair:0.5,{OTHER}:0.5", OTHER)
    assert not torch.equal(seeds[1], seeds[0]) and not torch.equal(classes.voxels[1], classes.voxels[0])


def test_between_shapes_the_ends_are_the_shapes(pipeline: ShapePipeline, voxels: torch.Tensor) -> None:
    found = pipeline.interpolate(voxels, -voxels, 3, label="chair", **FEW).voxels
    assert torch.equal(found[0], voxels) and torch.equal(found[2], -voxels)
    for options in ({"sampler": "ddpm"}, {"sampler": "ddim", "eta": 0.5}):
        with pytest.raises(ConfigError, match="draws noise on its way"):
            pipeline.interpolate(voxels, -voxels, 3, **FEW, **options)


def test_a_mixture_depends_on_its_weights_alone(pipeline: ShapePipeline) -> None:
    mixed = pipeline(1, label={"chair": 0.7, OTHER: 0.3}, **FEW)
    assert torch.equal(mixed.voxels, pipeline(1, label={"chair": 7, OTHER: 3}, **FEW).voxels)
    assert torch.equal(pipeline(1, label={"chair": 2.0}, **FEW).voxels, pipeline(1, label="chair", **FEW).voxels)
    assert not torch.equal(mixed.voxels, pipeline(1, label="chair", **FEW).voxels)
    assert mixed.classes == (f"chair:0.7,{OTHER}:0.3",) and mixed.names == (f"chair0.7+{OTHER}0.3_0000",)


def test_refusals_name_what_is_wrong(pipeline: ShapePipeline, voxels: torch.Tensor) -> None:
    keep = _half()
    for match, call in (
        (r"the grid is \(4, 4, 4\); this model makes \(8, 8, 8\)", lambda: pipeline.vary(voxels[:4, :4, :4], 0.5)),
        (r"outside \[-1, 1\]", lambda: pipeline.vary(3 * voxels, 0.5)),
        (r"outside \[-1, 1\]", lambda: pipeline.vary(voxels * torch.nan, 0.5)),
        (r"strength=1\.5", lambda: pipeline.vary(voxels, 1.5)),
        ("give booleans", lambda: pipeline.complete(voxels, keep.float())),
        ("num_resamples=0", lambda: pipeline.complete(voxels, keep, num_resamples=0)),
        ("mirror axis 'w' is unknown", lambda: pipeline(1, mirror="w")),
        ("class 'chiar' is unknown", lambda: pipeline(1, label={"chiar": 1.0})),
        ("weight -1.0 of class 'chair'", lambda: pipeline(1, label={"chair": -1.0})),
        ("add up to 0", lambda: pipeline(1, label={"chair": 0.0})),
        ("at least 1", lambda: pipeline.vary(voxels, 0.5, 0)),
        ("--num 1 is too few", lambda: pipeline.interpolate(1, 2, 1)),
        ("two seeds, two classes or two grids, found int and str", lambda: pipeline.interpolate(1, "chair")),
        ("no third one", lambda: pipeline.interpolate("chair", OTHER, label={"chair": 1.0})),
    ):
        with pytest.raises(ConfigError, match=match):
            call()


def test_boxes_in_the_cube() -> None:
    """Voxel i of R has its centre at (i + 0.5) / R - 0.5."""
    upper = box_mask([-0.5, 0, -0.5, 0.5, 0.5, 0.5], 8)
    assert torch.equal(upper, (torch.arange(8)[None, :, None] >= 4).expand(8, 8, 8))
    assert torch.equal(upper, box_mask([0.5, 0.5, 0.5, -0.5, 0, -0.5], 8))
    with pytest.raises(ConfigError, match="holds no voxel"):
        box_mask([1, 1, 1, 2, 2, 2], 8)


def test_mixtures_are_read_and_class_names_come_first() -> None:
    assert parse_label("chair:0.7, sofa:0.3", ["chair"]) == {"chair": 0.7, "sofa": 0.3}
    assert parse_label("a:1", ["a:1"]) == "a:1" and parse_label("chair", []) == "chair"
    with pytest.raises(ConfigError, match="no mixture"):
        parse_label("chair:x", [])


def _config(field: Any) -> ExportConfig:
    return ExportConfig(16, field, ("a",), VoxelDiffusionConfig(), UNet3DConfig())


def test_meshes_are_read_as_the_data_set_was(tmp_path: Path) -> None:
    trimesh.creation.box((0.5, 0.25, 0.25)).export(tmp_path / "box.obj")
    placed = read_voxels(tmp_path / "box.obj", _config("occupancy"), is_placed=True)
    # A voxel is inside if its centre is: 8 x 4 x 4 of 1/16.
    assert placed.shape == (16, 16, 16) and int((placed == 1).sum()) == 128 and int((placed == -1).sum()) == 16**3 - 128
    fitted = read_voxels(tmp_path / "box.obj", _config("occupancy"))
    assert int((fitted > 0).sum()) > 4 * 128
    turned = read_voxels(tmp_path / "box.obj", _config("occupancy"), is_placed=True, up="z")
    assert torch.equal(turned, placed.transpose(1, 2).flip(2))
    tsdf = read_voxels(tmp_path / "box.obj", _config("tsdf"), is_placed=True)
    assert torch.equal(tsdf > 0, placed > 0) and len(tsdf.unique()) > 4
    narrow = dataclasses.replace(_config("tsdf"), truncation_voxels=1.5)
    of_half_the_band = read_voxels(tmp_path / "box.obj", narrow, is_placed=True)
    assert torch.allclose(of_half_the_band, (2 * tsdf).clamp(-1, 1), atol=1e-6)
    with pytest.raises(MeshError):
        read_voxels(tmp_path / "none.obj", _config("tsdf"))


def test_grids_are_read_by_number_and_size(tmp_path: Path) -> None:
    grids = np.random.default_rng(0).random((3, 16, 16, 16)) < 0.5
    np.savez(tmp_path / "many.npz", voxels=grids)
    for number in range(3):
        found = read_voxels(f"{tmp_path}/many.npz:{number}", _config("occupancy"))
        assert torch.equal(found, torch.from_numpy(2.0 * grids[number] - 1).float())
    tsdf = read_voxels(f"{tmp_path}/many.npz:1", _config("tsdf"))
    assert torch.equal(tsdf > 0, torch.from_numpy(grids[1]))
    for name, match in (("many.npz", "holds 3 grids; name one"), ("many.npz:3", "numbers 0 to 2")):
        with pytest.raises(DataError, match=match):
            read_voxels(tmp_path / name, _config("occupancy"))
    np.save(tmp_path / "small.npy", grids[0, :8, :8, :8])
    with pytest.raises(DataError, match=r"8 x 8 x 8; this model makes 16\^3"):
        read_voxels(tmp_path / "small.npy", _config("occupancy"))


def test_command_line(model: Path, voxels: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez(tmp_path / "a.npz", voxels=voxels.numpy() > 0)
    file = str(tmp_path / "a.npz")
    base = ["--checkpoint", str(model), "--steps", "2", "--device", "cpu", "--out"]
    commands = {
        "complete": ["--complete", file, "--keep-box", "-0.5", "0", "-0.5", "0.5", "0.5", "0.5", "--num", "1"],
        "vary": ["--vary", file, "--strength", "0.5", "--class", "chair", "--num", "2"],
        "interpolate": ["--interpolate", "1", "2", "--num", "3", "--mirror", "x"],
        "mixture": ["--class", f"chair:0.7,{OTHER}:0.3", "--num", "1"],
    }
    lines = []
    for name, arguments in commands.items():
        assert cli.main([*base, str(tmp_path / name), *arguments]) == 0
        lines += json.loads((tmp_path / name / "manifest.json").read_text(encoding="utf-8"))["shapes"]
    assert [line["name"] for line in lines] == [
        "shape_complete_0000", "chair_vary_0000", "chair_vary_0001",
        "interpolate_0000", "interpolate_0001", "interpolate_0002", f"chair0.7+{OTHER}0.3_0000",
    ]  # fmt: skip
    assert lines[0]["settings"]["edit"]["kept_voxels"] == 256 and lines[3]["settings"]["mirror"] == "x"
    for i, ends in enumerate(((file, file), ("chair", OTHER), ("chair:2,椅子:1", OTHER))):
        assert cli.main([*base, str(tmp_path / f"{i}"), "--interpolate", *ends, "--num", "2"]) == 0
    # Other weights of a mixture are other shapes; a changed file and another class are other requests.
    other = [*base, str(tmp_path / "mixture"), "--class", f"chair:0.3,{OTHER}:0.7", "--num", "1"]
    assert cli.main(other) == 0
    found = json.loads((tmp_path / "mixture" / "manifest.json").read_text(encoding="utf-8"))["shapes"]
    assert sorted(line["name"] for line in found) == [f"chair0.3+{OTHER}0.7_0000", f"chair0.7+{OTHER}0.3_0000"]
    capsys.readouterr()
    assert cli.main([*base, str(tmp_path / "interpolate"), *commands["interpolate"], "--class", "chair"]) == 2
    assert "classes" in capsys.readouterr().err
    assert cli.main([*base, str(tmp_path / "x"), *commands["interpolate"], "--class", "chair", OTHER]) == 2
    assert "one --class or none, found 2" in capsys.readouterr().err
    # What was written in millimetres is placed where it was, too.
    for suffix in ("obj", "stl"):
        out = str(tmp_path / suffix)
        assert cli.main([*base, out, "--class", "chair", "--num", "1", "--format", suffix, "--surface", "blocks"]) == 0
    config = ShapePipeline.from_pretrained(model).config
    in_metres, in_millimetres = (
        read_voxels(tmp_path / suffix / f"chair_0000.{suffix}", config, is_placed=True) for suffix in ("obj", "stl")
    )
    assert (in_metres > 0).any() and torch.equal(in_metres > 0, in_millimetres > 0)
    numbered = [*base, str(tmp_path / "numbered"), "--class", "chair", "--num", "1", "--vary", f"{file}:0"]
    assert cli.main(numbered) == 0
    np.savez(tmp_path / "a.npz", voxels=voxels.numpy() < 0)
    for command, name in (([*base, str(tmp_path / "vary"), *commands["vary"]], file), (numbered, f"{file}:0")):
        assert cli.main(command) == 2
        assert f"content of {name}" in capsys.readouterr().err


def test_a_model_of_tokens_completes_and_mixes(
    voxels: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export_of_tokens(tmp_path / "model")
    np.savez(tmp_path / "a.npz", voxels=voxels.numpy() > 0)
    base = ["--checkpoint", str(tmp_path / "model"), "--device", "cpu", "--num", "2", "--format", "npz", "--out"]
    clean = ["--keep-cavities", "--min-part", "0"]
    half = [
        "--complete",
        str(tmp_path / "a.npz"),
        "--keep-box",
        "-0.5",
        "0",
        "-0.5",
        "0.5",
        "0.5",
        "0.5",
        "--resamples",
        "2",
    ]
    assert cli.main([*base, str(tmp_path / "half"), "--class", "chair", *half, *clean]) == 0
    for file in sorted((tmp_path / "half").glob("*.npz")):
        with np.load(file) as arrays:
            assert (arrays["voxels"][:, 4:] == (voxels.numpy() > 0)[:, 4:]).all()
    assert cli.main([*base, str(tmp_path / "mix"), "--class", "chair:0.7,cup:0.3"]) in (0, 1)  # 1: both are empty
    assert cli.main([*base, str(tmp_path / "way"), "--interpolate", "chair", "cup"]) in (0, 1)
    capsys.readouterr()
    for refused in (["--vary", str(tmp_path / "a.npz")], ["--mirror", "x"], ["--interpolate", "1", "2"]):
        assert cli.main([*base, str(tmp_path / "no"), *refused]) == 2
        assert "completes shapes and mixes classes; other edits need method=voxel_diffusion" in capsys.readouterr().err


def test_a_refused_edit_names_what_is_wrong_and_leaves_the_folder_free(
    model: Path, voxels: torch.Tensor, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "a.npz", voxels=voxels.numpy() > 0)
    out = tmp_path / "out"
    base = ["--checkpoint", str(model), "--steps", "2", "--device", "cpu", "--num", "1", "--out", str(out)]
    for arguments, reason in (
        (["--vary", str(tmp_path / "none.obj")], f"{tmp_path / 'none.obj'}: cannot be read"),
        (["--vary", str(tmp_path / "a.npz"), "--strength", "2"], "strength=2.0 must lie in [0, 1]"),
        (["--interpolate", "chair", "chiar"], "chiar is no seed and no file, and class 'chiar' is unknown"),
    ):
        assert cli.main([*base, *arguments]) == 2
        assert reason in capsys.readouterr().err
    assert cli.main([*base, "--vary", str(tmp_path / "a.npz")]) == 0
    made = (out / "manifest.json").read_bytes()
    assert cli.main([*base, "--vary", str(tmp_path / "none.obj")]) == 2  # refused beside what is there, which stays
    assert (out / "manifest.json").read_bytes() == made


def test_in_a_batch_every_sample_is_its_own(pipeline: ShapePipeline, voxels: torch.Tensor) -> None:
    """As GPUs compute them, together: each with its own weights, noise and place on the way."""
    method, networks = pipeline._method, pipeline._networks_in("float32")
    config = dataclasses.replace(pipeline.config.sampling, num_steps=3)
    weights = torch.tensor([[0.7, 0.3, 0.0], [0.0, 1.0, 0.0], [0.5, 0.5, 0.0]])
    edit = Edit(
        x_0=dense_to_morton(voxels),
        keep=dense_to_morton(_half().float()) > 0,
        toward=(5, 6, 7),
        weight=torch.tensor([0.0, 0.3, 1.0]),
        x_T=torch.randn(3, 512, generator=torch.Generator().manual_seed(1)),
    )
    with torch.inference_mode():
        together = method.sample(networks, weights, [1, 2, 3], config=config, edit=edit)
        for i in range(3):
            alone = method.sample(networks, weights[[i]], [i + 1], config=config, edit=edit.rows([i]))
            # Kernels round differently for another batch size.
            torch.testing.assert_close(together[[i]], alone, rtol=1e-3, atol=1e-3)
