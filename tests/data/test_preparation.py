"""From a folder of meshes to a data set: exact grids, determinism, bad meshes, interruption and reuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import trimesh

from shapediff.data.dataset import ShapeDataset
from shapediff.data.manifest import Field, read_manifest
from shapediff.data.packing import pack_grid, unpack_signal
from shapediff.data.preparation import prepare
from shapediff.data.report import ReportLine
from shapediff.data.sources import find_meshes
from shapediff.errors import ConfigError, DataError
from shapediff.geometry.mesh import load_mesh
from shapediff.geometry.voxelize import voxelize
from tests.data.data_helpers import files_of

ROOT = Path(__file__).resolve().parents[2]


def write_meshes(folder: Path, *, num: int = 3) -> Path:
    """Boxes and balls of different proportions, and a caption for the first box."""
    for i in range(num):
        box = trimesh.creation.box(extents=(1.0, 0.4 + 0.02 * i, 0.6))
        ball = trimesh.creation.icosphere(subdivisions=1 + i % 2)
        ball.apply_scale((1.0, 1.0 - 0.02 * i, 1.0))
        for name, mesh, suffix in (("box", box, "obj"), ("ball", ball, "stl")):
            path = folder / name / f"{name}_{i}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            mesh.export(path)
    (folder / "box" / "box_0.txt").write_text("a low box\nsecond line\n", encoding="utf-8")
    return folder


def report(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "report.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("field", ["occupancy", "tsdf"])
def test_mesh_to_data_set_is_exactly_voxelize(tmp_path: Path, field: Field) -> None:
    meshes = write_meshes(tmp_path / "meshes")
    summary = prepare(meshes, tmp_path / "out", resolution=16, field=field, workers=0)
    dataset = ShapeDataset(tmp_path / "out")
    assert summary.num_ok == 6 and dataset.classes == ["ball", "box"] and dataset.field == field
    for i, shape in enumerate(dataset.shapes):
        grid = voxelize(load_mesh(meshes / shape.source), resolution=16, field=field, truncation=3.0)
        expected = unpack_signal(pack_grid(grid, field=field)[None], field=field)[0]
        np.testing.assert_array_equal(dataset[i]["voxels"].numpy(), expected)
        assert dataset.classes[dataset.labels[i]] == shape.class_name == Path(shape.source).parent.name


def test_manifest_keeps_captions_and_transforms(tmp_path: Path) -> None:
    meshes = write_meshes(tmp_path / "meshes")
    prepare(meshes, tmp_path / "out", resolution=8, workers=0)
    shapes = {shape.id: shape for shape in read_manifest(tmp_path / "out").shapes}
    assert shapes["box/box_0.obj"].caption == "a low box"
    assert shapes["box/box_1.obj"].caption is None
    # The longest side, 1, becomes 15/16 of the cube.
    assert shapes["box/box_0.obj"].transform is not None
    assert shapes["box/box_0.obj"].transform["scale"] == pytest.approx(15 / 16)


def test_workers_do_not_change_a_byte(tmp_path: Path) -> None:
    meshes = write_meshes(tmp_path / "meshes")
    outs = [tmp_path / str(workers) for workers in range(3)]
    for workers, out in enumerate(outs):
        prepare(meshes, out, resolution=16, workers=workers, shard_bytes=2 * 16**3 // 8)
    first, second, third = map(files_of, outs)
    assert len(first) == 4  # 3 shards of 2 shapes, and the manifest
    assert first == second == third


def test_bad_meshes_are_skipped_with_a_reason(tmp_path: Path) -> None:
    meshes = write_meshes(tmp_path / "meshes", num=1)
    flat = trimesh.Trimesh(vertices=[[0, 0, 0], [1, 0, 0], [0, 1, 0]], faces=[[0, 1, 2]])
    flat.export(meshes / "box" / "flat.obj")
    (meshes / "box" / "empty.obj").write_text("")
    (meshes / "box" / "garbage.glb").write_bytes(os.urandom(300))
    (meshes / "box" / "nan.obj").write_text(
        "v nan 0 0\nv 1 0 0\nv 0 1 0\nv 0 0 1\nf 1 2 3\nf 1 2 4\nf 1 3 4\nf 2 3 4\n"
    )
    lines: list[ReportLine] = []
    summary = prepare(
        meshes, tmp_path / "out", resolution=8, workers=1, progress=lambda line, done, total: lines.append(line)
    )
    assert (summary.num_ok, summary.num_skipped) == (2, 4) and len(lines) == 6
    skipped = {line["source"]: line for line in report(tmp_path / "out") if line["status"] == "skipped"}
    assert sorted(skipped) == ["box/empty.obj", "box/flat.obj", "box/garbage.glb", "box/nan.obj"]
    assert all(line["reason"] for line in skipped.values())
    whole = next(line for line in report(tmp_path / "out") if line["source"] == "box/box_0.obj")
    assert whole["faces"] == 12 and whole["watertight"] is True and 0 < whole["fill"] < 1 and whole["seconds"] > 0


def test_all_bad_is_an_error_that_leaves_a_report(tmp_path: Path) -> None:
    (tmp_path / "in" / "a").mkdir(parents=True)
    (tmp_path / "in" / "a" / "empty.obj").write_text("")
    with pytest.raises(DataError, match="every source was skipped"):
        prepare(tmp_path / "in", tmp_path / "out", resolution=8, workers=0)
    assert len(report(tmp_path / "out")) == 1


def test_strange_file_names(tmp_path: Path) -> None:
    meshes = write_meshes(tmp_path / "meshes", num=1)
    names = [b"sp ace [x] #1.obj", "größe_椅子.obj".encode(), b"raw\xff.obj", b"new\nline.OBJ", b"-dash.obj"]
    for name in names:
        path = os.fsencode(meshes / "box") + b"/" + name
        with open(os.fsencode(meshes / "box" / "box_0.obj"), "rb") as source, open(path, "wb") as target:
            target.write(source.read())
    (meshes / "box" / ".hidden.obj").write_text("")
    summary = prepare(meshes, tmp_path / "out", resolution=8, workers=1)
    assert summary.num_ok == 7 and summary.num_skipped == 0
    ids = {shape.id for shape in read_manifest(tmp_path / "out").shapes}
    assert {"box/" + os.fsdecode(name) for name in names} <= ids


def test_a_second_run_reuses_and_takes_in_what_is_new(tmp_path: Path) -> None:
    meshes, out = write_meshes(tmp_path / "meshes"), tmp_path / "out"
    prepare(meshes, out, resolution=8, workers=0)
    before = files_of(out)
    again = prepare(meshes, out, resolution=8, workers=0)
    assert again.num_reused == 6 and files_of(out) == before
    trimesh.creation.box(extents=(1, 2, 3)).export(meshes / "box" / "new.obj")
    trimesh.creation.box(extents=(1, 1, 3)).export(meshes / "box" / "box_1.obj")
    third = prepare(meshes, out, resolution=8, workers=0)
    assert (third.num_ok, third.num_reused) == (7, 5)
    other = prepare(meshes, out, resolution=16, workers=0)
    assert other.num_reused == 0 and read_manifest(out).resolution == 16
    prepare(meshes, tmp_path / "fresh", resolution=16, workers=0)
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_damaged_cache_is_made_again(tmp_path: Path) -> None:
    meshes, out = write_meshes(tmp_path / "meshes", num=1), tmp_path / "out"
    prepare(meshes, out, resolution=8, workers=0)
    before = files_of(out)
    first, second = sorted((out / ".cache").rglob("*.grid"))
    first.write_bytes(first.read_bytes()[:-20])
    second.write_bytes(b"")
    assert prepare(meshes, out, resolution=8, workers=0).num_reused == 0
    assert files_of(out) == before


@pytest.mark.skipif(os.name != "posix", reason="sends POSIX signals")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_resume_after_a_kill_gives_the_identical_data_set(tmp_path: Path, number: int) -> None:
    meshes, out = write_meshes(tmp_path / "meshes", num=20), tmp_path / "out"
    command = [sys.executable, str(ROOT / "data_tools" / "prepare.py"), str(meshes), str(out), "--resolution", "64"]
    # A shell's background jobs, and so the tests, may be started with SIGINT ignored, which a process would inherit.
    heed = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    process = subprocess.Popen(
        [*command, "--workers", "1"], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, preexec_fn=heed
    )
    deadline = time.monotonic() + 60
    while len(list(out.glob(".cache/*/[0-9a-f]*.grid"))) < 3 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == (-signal.SIGKILL if number == signal.SIGKILL else 130)
    assert not (out / "manifest.json").exists()
    summary = prepare(meshes, out, resolution=64, workers=0)
    assert summary.num_ok == 40 and 3 <= summary.num_reused < 40
    prepare(meshes, tmp_path / "fresh", resolution=64, workers=0)
    assert files_of(out) == files_of(tmp_path / "fresh")


def test_classes_limit_and_splits(tmp_path: Path) -> None:
    meshes, out = write_meshes(tmp_path / "meshes"), tmp_path / "out"
    splits = {"box/box_0.obj": "test", "ball/ball_1.stl": "val", "box/box_2.obj": "test"}
    summary = prepare(
        meshes,
        out,
        resolution=8,
        workers=0,
        classes=["box", "ball"],
        limit=2,
        splits=splits,  # type: ignore[arg-type]
    )
    manifest = read_manifest(out)
    assert manifest.classes == ["box", "ball"] and summary.num_per_class == {"box": 2, "ball": 2}
    chosen = {shape.id: shape.split for shape in manifest.shapes}
    assert "box/box_2.obj" not in chosen, "a split of a mesh that the limit leaves out is no mistake"
    assert chosen["box/box_0.obj"] == "test" and chosen["ball/ball_1.stl"] == "val"


def test_meshes_in_the_root_and_deep_folders_have_a_class(tmp_path: Path) -> None:
    root = tmp_path / "things"
    write_meshes(root, num=1)
    trimesh.creation.box().export(root / "loose.ply")
    (root / "box" / "more" / "deep").mkdir(parents=True)
    trimesh.creation.box().export(root / "box" / "more" / "deep" / "a.off")
    (root / "box" / "loop").symlink_to(root / "box", target_is_directory=True)
    (root / "ball" / "notes.md").write_text("no mesh")
    found = [(source.class_name, source.name) for source in find_meshes(root)]
    assert found == [
        ("ball", "ball/ball_0.stl"),
        ("box", "box/box_0.obj"),
        ("box", "box/more/deep/a.off"),
        ("things", "loose.ply"),
    ]


def test_wrong_settings_say_what_to_do(tmp_path: Path) -> None:
    meshes, out = write_meshes(tmp_path / "meshes", num=1), tmp_path / "out"
    with pytest.raises(ConfigError, match="resolution=48; use a power of two"):
        prepare(meshes, out, resolution=48)
    with pytest.raises(ConfigError, match="field='mesh'; use one of occupancy, tsdf"):
        prepare(meshes, out, field="mesh")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="splits names 'dev'"):
        prepare(meshes, out, splits={"box/box_0.obj": "dev"})  # type: ignore[dict-item]
    lost = dict.fromkeys(("box/0.obj", "box/1.obj", "box/2.obj", "box/3.obj", "box/box_0.obj"), "test")
    with pytest.raises(
        ConfigError, match=r"4 names in splits are of no mesh.*'box/0\.obj'.*\.\.\.; .*'ball/ball_0\.stl'"
    ):
        prepare(meshes, out, splits=lost)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"no mesh of class 'sofa'.*found ball, box"):
        prepare(meshes, out, classes=["sofa"])
    with pytest.raises(DataError, match="is neither a folder"):
        prepare(tmp_path / "nowhere", out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="nothing to read"):
        prepare(tmp_path / "empty", out)
    assert not out.exists()
