"""The pipeline and the command line on a small random model: sample i is sample i, errors say what there is."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from shapediff import hub
from shapediff import sample as cli
from shapediff.data.sampler import sample_seed
from shapediff.diffusion.editing import Edit
from shapediff.errors import ConfigError
from shapediff.geometry.export import largest_share
from shapediff.geometry.mesh import load_mesh
from shapediff.geometry.printable import MeshOptions, solid_voxels
from shapediff.geometry.report import check_mesh
from shapediff.pipeline import ShapePipeline, _in_one_part
from shapediff.shapes import MESH_FORMATS, VOXEL_FORMATS, Shapes
from tests.models.test_norm import threads
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


def test_a_batch_that_would_round_otherwise_is_not_computed_together(
    pipeline: ShapePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sizes whose kernels sum up in another order are found out by a step of noise, and their samples drawn one by one."""
    options = {"label": "chair", "seed": 5, "precision": "float32", "num_steps": 4, "guidance_interval": (0.0, 0.9)}
    expected = pipeline(7, batch_size=1, **options)  # type: ignore[arg-type]
    sample, sizes = pipeline._sample, []

    def rounding_otherwise(label: torch.Tensor, *args: object) -> torch.Tensor:
        sizes.append(len(label))
        return sample(label, *args) + (1e-7 if len(label) == wrong else 0)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "_sample", rounding_otherwise)
    for wrong in (4, 2):
        monkeypatch.setattr(pipeline, "_round_alike", {})
        sizes.clear()
        assert torch.equal(pipeline(7, **options).voxels, expected.voxels)  # type: ignore[arg-type]
        assert sizes.count(wrong) <= 1  # that step


def test_what_rounds_alike_is_asked_anew_for_other_threads(
    pipeline: ShapePipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"label": "chair", "precision": "bf16", "num_steps": 2, "guidance_scale": 1.0}
    sample = pipeline._sample

    def rounding_otherwise(label: torch.Tensor, *args: object) -> torch.Tensor:
        return sample(label, *args) + (1e-7 if len(label) > 1 and torch.get_num_threads() == 2 else 0)  # type: ignore[arg-type]

    monkeypatch.setattr(pipeline, "_sample", rounding_otherwise)
    for number in (1, 2):
        with threads(number):
            found, expected = pipeline(4, **options), pipeline(4, batch_size=1, **options)  # type: ignore[arg-type]
            assert torch.equal(found.voxels, expected.voxels)


def test_networks_made_for_sampling_stay_where_they_are(pipeline: ShapePipeline) -> None:
    """Weights in an order that only a CPU's library reads: another device, and a copy, make their own."""
    options = {"label": "chair", "precision": "bf16", "num_steps": 2}
    expected = pipeline(2, **options)  # type: ignore[arg-type]
    for other in (copy.deepcopy(pipeline), pickle.loads(pickle.dumps(pipeline)), pipeline.to("cpu")):
        assert set(other._networks) == {"float32"}
        assert torch.equal(other(2, **options).voxels, expected.voxels)


def test_progress_counts_every_step_of_every_shape(pipeline: ShapePipeline) -> None:
    """Of variations too, which come as they are done."""
    grid = torch.ones(3 * (pipeline.config.resolution,))
    for of in ("shapes", "variations"):
        seen: list[tuple[int, int]] = []
        options = {
            "label": "chair",
            "num_steps": 3,
            "on_step": lambda done, steps, seen=seen: seen.append((done, steps)),
        }
        stream = (
            pipeline.stream(19, **options) if of == "shapes" else pipeline.stream_variations(grid, 0.5, 19, **options)
        )
        assert sum(map(len, stream)) == 19
        assert seen == sorted(set(seen)) and seen[-1][0] == seen[-1][1] and len({steps for _, steps in seen}) == 1


def test_a_shape_in_several_parts_is_drawn_again(pipeline: ShapePipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    """The most nearly whole draw, whose seed makes it; "whole" is "full" here, since these models make noise in one part."""

    def largest_share(grid: np.ndarray) -> float:
        return float((grid > 0).mean())

    monkeypatch.setattr("shapediff.geometry.export.largest_share", largest_share)
    options = {"label": "chair", "seed": 5, "precision": "float32", "num_steps": 4, "guidance_scale": 1.0}
    draws, num = 4, 5
    first = pipeline(num, **options)  # type: ignore[arg-type]
    found = pipeline(num, draws=draws, **options)  # type: ignore[arg-type]
    config = pipeline._sample_config({"num_steps": 4, "guidance_scale": 1.0})
    changed = 0
    for i, seed in enumerate(first.seeds):
        seeds = [seed, *(sample_seed(seed, attempt) for attempt in range(1, draws))]
        grids = [pipeline._sample(torch.tensor([0]), [s], Edit(), config, "float32", None)[0] for s in seeds]
        shares = [(grid > 0).float().mean().item() for grid in grids]
        best = shares.index(max(shares))
        assert found.seeds[i] == seeds[best] and torch.equal(found.voxels[i], grids[best])
        changed += best > 0
    assert changed and found.names == first.names and found.settings["draws"] == draws
    with pytest.raises(ConfigError, match="draws is not for interpolations"):
        pipeline.interpolate(1, 2, 2, label="chair", draws=2)
    with pytest.raises(ConfigError, match="draws=0 must be at least 1"):
        pipeline(1, draws=0)


def test_no_more_is_drawn_than_is_needed() -> None:
    """Shapes of a recipe: those that are whole stay, and a draw that is less whole is not taken."""
    bar, two = np.full((2, 4, 4, 4), -1.0, np.float32)
    bar[:3, 0, 0] = 1
    two[0], two[3, 0, :2] = 1, 1
    three = two.copy()
    three[2, 3, 3] = 1
    asked = []

    def draw(chosen: Sequence[int], seeds: Sequence[int], on_step: object) -> torch.Tensor:
        asked.append(list(chosen))
        recipe = {0: [bar], 1: [three, two, bar], 2: [two, three, three]}
        return torch.from_numpy(np.stack([recipe[i][len(asked) - 1] for i in chosen]))

    voxels, seeds = _in_one_part(3, [7, 8, 9], draw, None)
    assert asked == [[0, 1, 2], [1, 2], [1, 2]]
    assert seeds == [7, sample_seed(8, 2), 9]
    assert [largest_share(grid.numpy()) for grid in voxels] == [1, 1, 16 / 18]
    asked.clear()
    assert _in_one_part(3, [7], lambda *given: draw(*given), None)[1] == [7] and asked == [[0]]
    assert largest_share(np.full((2, 2, 2), -1.0, np.float32)) == 0


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
    with pytest.raises(ConfigError, match="format 'fbx' is unknown"):
        pipeline(1, num_steps=1).save(Path("nowhere"), format="fbx")
    with pytest.raises(ConfigError, match="y up by its standard"):
        pipeline(1, num_steps=1).save(Path("nowhere"), format="glb", options=MeshOptions(up="z"))


def test_command_line_writes_meshes_a_manifest_and_a_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ["--checkpoint", str(tmp_path / "model"), "--steps", "3", "--out", str(out)]
    everything = ["--class", "all", "--num", "2", "--guidance", "3", "--batch-size", "1", "--preview", "--html"]
    assert cli.main([*arguments, *everything]) == 0
    lines = json.loads((out / "manifest.json").read_text(encoding="utf-8"))["shapes"]
    assert [line["name"] for line in lines] == ["chair_0000", "chair_0001", "椅子_0000", "椅子_0001"]
    for line in lines:
        assert line["settings"]["guidance_scale"] == 3
        mesh = trimesh.load(out / line["file"], force="mesh")
        assert mesh.is_watertight
        assert mesh.volume > 0
    assert (out / "preview.png").read_bytes().startswith(b"\x89PNG")
    page = (out / "shapes.html").read_text(encoding="utf-8")
    assert page.count("<figure ") == 4 and '<h2 id="group-2">椅子</h2>' in page
    assert "4 meshes" in capsys.readouterr().out
    # The same again as glb, fewer of them: the same shapes.
    before = (out / "chair_0000.obj").read_bytes()
    assert cli.main([*arguments, "--class", "chair", "--num", "1", "--turntable"]) == 0
    assert "1 mesh in" in capsys.readouterr().out
    assert (out / "chair_0000.obj").read_bytes() == before
    assert (out / "turntable.gif").read_bytes().startswith(b"GIF89a")


@pytest.mark.parametrize("format", ["3mf", "npz"])
def test_what_is_drawn_was_meshed_once_and_is_in_metres(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    export(tmp_path / "model")
    drawn, made, mesh_of = [], [], Shapes.mesh
    monkeypatch.setattr(cli.Pictures, "add", lambda self, mesh, name, group: drawn.append(mesh))
    monkeypatch.setattr(Shapes, "mesh", lambda self, i, options=None: made.append(i) or mesh_of(self, i, options))
    arguments = ["--checkpoint", str(tmp_path / "model"), "--class", "chair", "--num", "2", "--steps", "2", "--preview"]
    arguments += ["--height", "12cm", *(["--up", "z"] if format == "3mf" else [])]
    assert cli.main([*arguments, "--format", format, "--out", str(tmp_path / "out")]) == 0
    assert len(made) == 2
    assert [float(mesh.extents[1]) for mesh in drawn] == pytest.approx([0.12] * 2, rel=1e-5)


def noise_shapes() -> Shapes:
    """A shape of random voxels, and an empty one."""
    voxels = torch.cat(
        [torch.randn(1, 8, 8, 8, generator=torch.Generator().manual_seed(0)), torch.full((1, 8, 8, 8), -1.0)]
    )
    return Shapes(voxels.clamp(-1, 1), ("a", "b"), (None, None), (1, 2), {"num_steps": 3})


@pytest.mark.parametrize("format", MESH_FORMATS)
@pytest.mark.parametrize("surface", ["smooth", "blocks"])
def test_a_saved_mesh_is_what_its_line_says(tmp_path: Path, format: str, surface: str) -> None:
    options = MeshOptions(surface=surface, height=0.25)  # type: ignore[arg-type]
    path, none = noise_shapes().save(tmp_path, format, options)
    line, empty = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))["shapes"]
    assert none is None and empty["file"] is None and "empty" in empty["reason"]
    assert line["file"] == f"a.{format}" and line["mesh"]["height"] == 0.25
    assert line["closed"] and line["manifold"] and not line["degenerate"] and not line["crossing"]
    back = load_mesh(path)  # type: ignore[arg-type]
    scale = 1000 if format in ("stl", "3mf") else 1
    report = check_mesh(back)
    assert report.is_printable
    assert (report.parts, report.cavities, report.faces) == (line["parts"], line["cavities"], line["faces"])
    assert report.volume == pytest.approx(line["volume"] * scale**3, rel=1e-4)
    assert report.area == pytest.approx(line["area"] * scale**2, rel=1e-4)
    assert list(report.size) == pytest.approx([length * scale for length in line["size"]], rel=1e-5)
    assert line["size"][1] == pytest.approx(0.25)


def test_a_3mf_says_its_unit_and_a_glb_its_name(tmp_path: Path) -> None:
    noise_shapes().save(tmp_path, "3mf", MeshOptions(height=0.25))
    assert trimesh.load(tmp_path / "a.3mf").units == "millimeter"
    noise_shapes().save(tmp_path, "glb", MeshOptions(height=0.25))
    scene = trimesh.load(tmp_path / "a.glb")
    assert scene.units == "meters"
    assert list(scene.geometry) == ["a"] and "a" in scene.graph.nodes_geometry
    assert "vertex_normals" in scene.geometry["a"]._cache


@pytest.mark.parametrize("format", VOXEL_FORMATS)
def test_voxels_are_saved_clean(tmp_path: Path, format: str) -> None:
    shapes = noise_shapes()
    path, none = shapes.save(tmp_path, format)
    assert path == tmp_path / f"a.{format}" and path.exists() and none is None
    line = json.loads((tmp_path / "manifest.json").read_text(encoding="utf-8"))["shapes"][0]
    inside = solid_voxels(shapes.voxels[0].numpy(), MeshOptions())
    assert (line["num_inside"], line["resolution"]) == (inside.sum(), 8)
    if format == "binvox":
        assert (trimesh.load(path).matrix == inside).all()


def test_command_line_passes_mesh_options_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export(tmp_path / "model")
    arguments = ["--checkpoint", str(tmp_path / "model"), "--class", "chair", "--num", "1", "--steps", "3"]
    flags = ["--surface", "blocks", "--smoothing", "3", "--max-faces", "900", "--height", "90cm", "--up", "z"]
    flags += ["--keep-cavities", "--min-part", "0.2", "--format", "stl", "--preview"]
    assert cli.main([*arguments, *flags, "--out", str(tmp_path / "out")]) == 0
    (line,) = json.loads((tmp_path / "out" / "manifest.json").read_text(encoding="utf-8"))["shapes"]
    assert MeshOptions(**line["mesh"]) == MeshOptions("blocks", 3, 900, 0.9, "z", True, 0.2)
    assert trimesh.load(tmp_path / "out" / "chair_0000.stl").extents[2] == pytest.approx(900, rel=1e-6)
    assert "(stl, 90 cm high)" in capsys.readouterr().out
    assert cli.main([*arguments, "--format", "schem", "--out", str(tmp_path / "voxels")]) == 0
    assert (tmp_path / "voxels" / "chair_0000.schem").read_bytes().startswith(b"\x1f\x8b")
    assert cli.main([*arguments, "--height", "tall"]) == 2
    assert cli.main([*arguments, "--format", "glb", "--up", "z", "--out", str(tmp_path / "none")]) == 2


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
    guiding = ["--class", "chair", "--guidance-interval", "0.9", "0.2"]
    assert cli.main(["--checkpoint", str(tmp_path / "model"), *guiding]) == 2
    assert "guidance_interval=(0.9, 0.2)" in capsys.readouterr().err
    assert cli.main(["--checkpoint", str(tmp_path / "model"), "--sampler", "heun", "--eta", "0.5"]) == 2
    assert "belongs to the sampler ddim" in capsys.readouterr().err
    assert cli.main(["--checkpoint", str(tmp_path / "model"), "--steps", "2000"]) == 2
    assert capsys.readouterr().err.startswith("error: num_steps=2000 is more than the 1000 timesteps")
    assert cli.main(["--checkpoint", str(tmp_path / "none"), "--class", "chair"]) == 2
    assert "no checkpoint at" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "PRETRAINED_FOLDER", tmp_path / "none")
    assert cli.main(["--class", "chair"]) == 2
    assert "make quickstart" in capsys.readouterr().err
