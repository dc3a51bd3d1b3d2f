"""The page's work without the page: forms in, shapes out, and nothing read that is not the visitor's to read."""

from __future__ import annotations

import dataclasses
import os
import time
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh

from shapediff.app import results, uploads
from shapediff.app.__main__ import main
from shapediff.app.checkpoints import Checkpoints
from shapediff.app.edits import kept_side
from shapediff.app.fields import of_checkpoint
from shapediff.app.jobs import Jobs, Stopped
from shapediff.app.server import studio_in_own_folder
from shapediff.app.settings import SIDES
from shapediff.app.studio import STOPPABLE, Studio
from shapediff.errors import CheckpointError, ConfigError, MeshError
from shapediff.geometry.voxelize import voxelize
from shapediff.pipeline import ShapePipeline
from tests.test_checkpoint import export, export_of_tokens

FORM: dict[str, Any] = {
    "checkpoint": "tiny",
    "label": "chair",
    "num": 2,
    "seed": 5,
    "guidance": 3.0,
    "steps": 3,
    "sampler": "ddim",
    "mirror": False,
}


@pytest.fixture
def studio(tmp_path: Path) -> Studio:
    export(tmp_path / "runs" / "tiny" / "export")
    return Studio(Checkpoints(tmp_path / "runs", device="cpu"), tmp_path / "work")


def test_checkpoints_are_named_and_never_paths(studio: Studio, tmp_path: Path) -> None:
    export(tmp_path / "runs" / "shared")
    export(tmp_path / "outside")
    assert sorted(studio.checkpoints.names()) == ["shared", "tiny"]
    assert studio.checkpoints.load("shared").classes == ("chair", "椅子")
    assert studio.checkpoints.load("tiny") is studio.checkpoints.load("tiny")
    for name in ("../outside", str(tmp_path / "outside"), "tiny/export", ".", "", None, 3):
        with pytest.raises(ConfigError, match="checkpoint"):
            studio.checkpoints.load(name)
    with pytest.raises(CheckpointError, match="no trained model"):
        Checkpoints(tmp_path / "work").names()


def test_a_checkpoint_that_was_replaced_is_read_anew(studio: Studio, tmp_path: Path) -> None:
    before = studio.checkpoints.load("tiny")
    weights = tmp_path / "runs" / "tiny" / "export" / "model.safetensors"
    os.utime(weights, (1, 1))
    assert studio.checkpoints.load("tiny") is not before


def test_generated_shapes_are_the_pipelines(studio: Studio, tmp_path: Path) -> None:
    steps: list[tuple[int, int]] = []
    made = studio.generate("v", FORM, lambda done, of: steps.append((done, of)))
    assert steps == sorted(set(steps)) and steps[-1] == (6, 6) and {of for _, of in steps} == {6}
    kept = studio.results.shapes(made.token)
    expected = ShapePipeline.from_pretrained(tmp_path / "runs" / "tiny")(
        2, label="chair", seed=5, guidance_scale=3.0, num_steps=3, sampler="ddim"
    )
    assert torch.equal(kept.voxels, expected.voxels)
    assert kept.seeds == expected.seeds
    assert str(tmp_path) not in str(kept.settings)


def test_a_model_without_steps_takes_the_same_form(studio: Studio, tmp_path: Path) -> None:
    """The page hides what does nothing; what the hidden fields post is left out."""
    export_of_tokens(tmp_path / "runs" / "tokens" / "export")
    hidden = of_checkpoint(studio, "tokens")
    assert [hidden[name]["visible"] for name in ("quality", "steps", "sampler")] == [False] * 3
    assert all(of_checkpoint(studio, "tiny")[name]["visible"] for name in ("quality", "steps", "sampler"))
    made = studio.generate("v", {**FORM, "checkpoint": "tokens"})
    assert made.message == "2 shapes."
    assert studio.results.shapes(made.token).settings["guidance_scale"] == 3


@pytest.mark.parametrize("format", ["obj", "stl", "glb"])
def test_files_read_back_closed(studio: Studio, format: str) -> None:
    made = studio.generate("v", FORM)
    *meshes, archive = studio.results.files(made.token, format)
    assert [path.name for path in meshes] == [f"{name}.{format}" for name in made.names]
    for i, path in enumerate(meshes):
        unit = 1000.0 if format == "stl" else 1.0  # millimetres, as slicers read it
        volume = trimesh.load(path, force="mesh").volume / unit**3
        assert volume == pytest.approx(studio.results.shapes(made.token).mesh(i).volume, rel=1e-5)
    with zipfile.ZipFile(archive) as packed:
        assert sorted(packed.namelist()) == sorted([*(path.name for path in meshes), "manifest.json"])
    assert studio.results.files(made.token, format) == [*meshes, archive]


def test_names_from_a_hostile_checkpoint_stay_in_the_folder(studio: Studio) -> None:
    made = studio.generate("v", FORM)
    shapes = studio.results.shapes(made.token)
    token = studio.results.keep(dataclasses.replace(shapes, names=("../../a", "/etc/passwd")))
    *meshes, _ = studio.results.files(token, "obj")
    assert [path.name for path in meshes] == ["a.obj", "etc_passwd.obj"]
    assert all(path.resolve().is_relative_to(studio.files.resolve() / token) for path in meshes)
    token = studio.results.keep(dataclasses.replace(shapes, names=("a/b", "a\\b")))
    assert studio.results.shapes(token).names == ("a_b_0000", "a_b_0001")


def test_a_token_or_format_that_is_not_one_is_refused(studio: Studio) -> None:
    made = studio.generate("v", FORM)
    for token in (None, 3, "", "..", "../" + made.token, made.token + "\n", "0" * 32, made.token.upper() + "x"):
        with pytest.raises(ConfigError, match="generate them again"):
            studio.results.shapes(token)
    for format in ("fbx", "../obj", None):
        with pytest.raises(ConfigError, match="format"):
            studio.results.files(made.token, format)


def test_old_results_go(studio: Studio) -> None:
    old, new = studio.generate("v", FORM).token, studio.generate("v", FORM).token
    long_ago = time.time() - results.KEEP_SECONDS - 1
    os.utime(studio.files / old, (long_ago, long_ago))
    results.remove_old(studio.files)
    assert [path.name for path in studio.files.iterdir()] == [new]


def test_everything_goes_with_the_server(studio: Studio) -> None:
    with studio_in_own_folder(studio.checkpoints) as own:
        token = own.generate("v", FORM).token
        work = own.files.parent
        assert (own.files / token).is_dir()
        assert work.stat().st_mode & 0o077 == 0  # other users of the machine do not look in
    assert not work.exists()


def test_the_command_line_says_where_models_would_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--checkpoints", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: there is no trained model under {tmp_path}")


def test_a_stop_keeps_what_is_done(studio: Studio) -> None:
    studio.jobs.begin("v")

    def stop_in_the_last_shape(done: int, steps: int) -> None:
        if done > STOPPABLE * 3:
            studio.jobs.stop("v")

    made = studio.generate("v", {**FORM, "num": STOPPABLE + 1}, stop_in_the_last_shape)
    assert made.names == tuple(f"chair_{i:04d}" for i in range(STOPPABLE))
    assert f"{STOPPABLE} of {STOPPABLE + 1}" in made.message
    # The next one begins anew; that of another visitor was never stopped.
    studio.jobs.begin("v")
    assert len(studio.generate("v", FORM).names) == len(studio.generate("w", FORM).names) == 2


def test_a_stop_counts_while_waiting_and_so_does_time() -> None:
    jobs = Jobs(max_seconds=0.0)
    jobs.begin("v")
    jobs.stop("v")
    with pytest.raises(Stopped), jobs.turn("v"):
        pass
    with jobs.turn("w") as step:
        time.sleep(0.01)
        with pytest.raises(Stopped, match="fewer shapes"):
            step(1, 2)
    with jobs.turn("w"):  # the turn was given back
        pass


def test_a_mesh_is_voxelized_as_data_sets_are(studio: Studio, tmp_path: Path) -> None:
    pipeline = studio.checkpoints.load("tiny")
    mesh = trimesh.creation.box((1.0, 0.5, 0.25))
    (studio.files / "up").mkdir()
    mesh.export(studio.files / "up" / "box.obj")
    signal = studio.uploads.voxels(str(studio.files / "up" / "box.obj"), pipeline, up="y")
    expected = voxelize(mesh, resolution=pipeline.config.resolution)
    assert np.array_equal(signal.numpy(), np.where(expected, np.float32(1), np.float32(-1)))
    turned = studio.uploads.voxels(str(studio.files / "up" / "box.obj"), pipeline, up="z")
    assert np.array_equal(turned.numpy() > 0, expected.transpose(0, 2, 1)[:, :, ::-1])
    # What is not an upload is not read, however it is named.
    mesh.export(tmp_path / "secret.obj")
    (studio.files / "link.obj").symlink_to(tmp_path / "secret.obj")
    for path in (
        tmp_path / "secret.obj",
        studio.files / "link.obj",
        studio.files / ".." / ".." / "secret.obj",
        "",
        None,
    ):
        with pytest.raises(MeshError, match="upload it again"):
            studio.uploads.voxels(path, pipeline, up="y")
    (studio.files / "notes.txt").write_text("v 0 0 0")
    with pytest.raises(MeshError, match=r"\.txt cannot be read"):
        studio.uploads.voxels(studio.files / "notes.txt", pipeline, up="y")
    (studio.files / "broken.stl").write_bytes(b"solid nothing")
    with pytest.raises(MeshError, match=r"^your mesh "):
        studio.uploads.voxels(studio.files / "broken.stl", pipeline, up="y")
    (studio.files / "large.stl").write_bytes(bytes((uploads.MAX_MEGABYTES << 20) + 1))
    with pytest.raises(MeshError, match="larger than the limit") as error:
        studio.uploads.voxels(studio.files / "large.stl", pipeline, up="y")
    assert "--" not in str(error.value)  # flags are no help on a page
    studio.close()


@pytest.mark.parametrize("side", SIDES)
def test_the_kept_side_is_where_it_says(side: str) -> None:
    keep = kept_side(8, side, 0.25)
    assert keep.sum() == 2 * 8 * 8
    centre = keep.nonzero().float().mean(0) - 3.5
    direction = {"left": (0, -1), "right": (0, 1), "bottom": (1, -1), "top": (1, 1), "back": (2, -1), "front": (2, 1)}
    axis, sign = direction[side]
    assert centre[axis] == sign * 3
    assert kept_side(8, side, 0.01).sum() == 64


def test_edits_keep_what_they_promise(studio: Studio) -> None:
    made = studio.generate("v", FORM)
    first, second = studio.results.shapes(made.token).voxels
    start = {"source_kind": "a shape made here", "source_shape": made.names[0]}
    end = {"target_kind": "a shape made here", "target_shape": made.names[1]}

    def edited(edit: str, **form: Any) -> torch.Tensor:
        token = studio.edit("v", {**FORM, **start, **end, "token": made.token, "edit": edit, **form}).token
        return studio.results.shapes(token).voxels

    completed = edited("Complete", side="bottom", share=0.5)
    assert torch.equal(completed[:, :, :4], first[:, :4].expand(2, -1, -1, -1))
    assert not torch.equal(completed[0], first)
    assert torch.equal(edited("Vary", strength=0.0)[1], first)
    assert not torch.equal(edited("Vary", strength=1.0)[1], first)
    between = edited("Interpolate", between="two shapes", num=3)
    assert torch.equal(between[0], first)
    assert torch.equal(between[-1], second)
    seeds = edited("Interpolate", between="two seeds", second_seed=9)
    assert torch.equal(seeds[0], first)
    classes = edited("Interpolate", between="two classes", second_label="椅子")
    assert torch.equal(classes[0], first)
    mixed = edited("Mix classes", second_label="椅子", second_share=0.5, mirror=True)
    assert torch.equal(mixed, mixed.flip(1))
    for share, label in ((0.0, "chair"), (1.0, "椅子")):
        alone = studio.results.shapes(studio.generate("v", {**FORM, "label": label}).token).voxels
        assert torch.equal(edited("Mix classes", second_label="椅子", second_share=share), alone)


def test_an_edit_of_what_is_not_there_is_refused(studio: Studio) -> None:
    form = {**FORM, "edit": "Vary", "strength": 0.5, "source_kind": "a shape made here", "source_shape": "chair_0000"}
    with pytest.raises(ConfigError, match="generate them again"):
        studio.edit("v", {**form, "token": None})
    token = studio.generate("v", FORM).token
    with pytest.raises(ConfigError, match="source shape 'chair_0007' is unknown"):
        studio.edit("v", {**form, "token": token, "source_shape": "chair_0007"})
    with pytest.raises(ConfigError, match="bring a mesh for the source first"):
        studio.edit("v", {**form, "source_kind": "my own mesh", "source_file": None})
    shapes = studio.results.shapes(token)
    larger = studio.results.keep(dataclasses.replace(shapes, voxels=torch.zeros(2, 16, 16, 16)))
    with pytest.raises(ConfigError, match="16 voxels a side and this model makes 8"):
        studio.edit("v", {**form, "token": larger})


@pytest.mark.parametrize(
    ("edit", "form"),
    [
        ("Complete", {"side": "inside", "share": 0.5}),
        ("Complete", {"side": "top", "share": 1.5}),
        ("Vary", {"strength": -1}),
        ("Interpolate", {"between": "two chairs"}),
        ("Interpolate", {"between": "two seeds", "second_seed": 1e300}),
        ("Interpolate", {"between": "two classes", "second_label": "../sofa"}),
        ("Mix classes", {"second_label": None, "second_share": 0.5}),
        ("__init__", {}),
    ],
)
def test_an_edit_that_does_not_check_is_refused(studio: Studio, edit: str, form: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        studio.edit("v", {**FORM, "edit": edit, **form})
