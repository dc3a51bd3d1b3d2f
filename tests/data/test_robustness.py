"""Preparation when things go wrong: a full disk, a mesh that eats memory or time, a mesh that changes, two runs at once."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import trimesh

from shapediff.data import mesh_job, shards
from shapediff.data import report as data_report
from shapediff.data.dataset import ShapeDataset
from shapediff.data.importing import import_voxels
from shapediff.data.manifest import read_manifest
from shapediff.data.mesh_job import MeshLimits
from shapediff.data.preparation import prepare
from shapediff.data.verification import verify_dataset
from shapediff.errors import ConfigError, DataError
from shapediff.files import exclusive
from tests.data.data_helpers import files_of
from tests.data.test_preparation import report, write_meshes
from tests.data.test_sources import BOX, pack

ROOT = Path(__file__).resolve().parents[2]


def test_archive_folder_and_table_give_the_same_shapes(tmp_path: Path) -> None:
    meshes = write_meshes(tmp_path / "meshes")
    files = {path.relative_to(meshes).as_posix(): path.read_bytes() for path in sorted(meshes.rglob("*.*"))}
    table = tmp_path / "meshes" / "all.csv"
    rows = [f"{name},{name.split('/')[0]}" for name in files if not name.endswith(".txt")]
    table.write_text("\n".join(["path,class", *rows]))
    inputs = [meshes, table, *(pack(tmp_path / name, files) for name in ("a.zip", "a.tar", "a.tar.gz"))]
    results = []
    for i, source in enumerate(inputs):
        prepare(source, tmp_path / f"out{i}", resolution=16, workers=1)
        results.append(files_of(tmp_path / f"out{i}"))
    assert all(result == results[0] for result in results[1:])
    assert ShapeDataset(tmp_path / "out2").shapes[3].caption == "a low box"


def write_gltf(folder: Path, name: str, mesh: trimesh.Trimesh, buffer: str) -> None:
    """With one buffer in a file of its own, whose URI has %20 for a blank."""
    files = trimesh.exchange.gltf.export_gltf(trimesh.Scene(mesh), merge_buffers=True)
    tree = json.loads(files["model.gltf"])
    (uri,) = (entry["uri"] for entry in tree["buffers"])
    tree["buffers"][0]["uri"] = buffer.replace(" ", "%20")
    (folder / buffer).parent.mkdir(parents=True, exist_ok=True)
    (folder / buffer).write_bytes(files[uri])
    (folder / name).write_text(json.dumps(tree))


def test_a_gltf_depends_on_its_own_buffers_alone(tmp_path: Path) -> None:
    """Buffers of others in one folder are neither read nor a reason to do a mesh again; a change of its own is."""
    folder, out = tmp_path / "in" / "c", tmp_path / "out"
    for i, buffer in enumerate(["a b.bin", "data/1.bin", "2.buffer"]):
        write_gltf(folder, f"{i}.gltf", trimesh.creation.box((1, 0.3 + 0.2 * i, 0.5)), buffer)
    assert prepare(tmp_path / "in", out, resolution=16, workers=0).num_ok == 3
    write_gltf(folder, "3.gltf", trimesh.creation.icosphere(), "3.bin")
    again = prepare(tmp_path / "in", out, resolution=16, workers=0)
    assert (again.num_ok, again.num_reused) == (4, 3)
    files = {f"x/{path.relative_to(tmp_path / 'in').as_posix()}": path.read_bytes() for path in folder.rglob("*.*")}
    prepare(pack(tmp_path / "x.zip", files), tmp_path / "zipped", resolution=16, workers=0)
    grids = [[s.grid_sha256 for s in read_manifest(folder).shapes] for folder in (out, tmp_path / "zipped")]
    assert len(set(grids[0])) == 4 and grids[0] == grids[1]
    (folder / "a b.bin").write_bytes((folder / "data/1.bin").read_bytes())
    changed = prepare(tmp_path / "in", out, resolution=16, workers=0)
    assert changed.num_reused == 3 and len({s.grid_sha256 for s in read_manifest(out).shapes}) == 3


def test_all_loops_are_compiled_before_a_workers_first_mesh() -> None:
    """Otherwise their half minute counts against --timeout, of each mesh anew where it does not suffice."""
    code = """
import importlib, pkgutil, trimesh
from numba.core.dispatcher import Dispatcher
from shapediff.data import mesh_job
from shapediff.geometry import kernels
from shapediff.geometry.voxelize import voxelize
modules = [importlib.import_module(f"{kernels.__name__}.{m.name}") for m in pkgutil.iter_modules(kernels.__path__)]
loops = [f for module in modules for f in vars(module).values() if isinstance(f, Dispatcher)]
mesh_job._warm_up()
before = [len(f.signatures) for f in loops]
ball = trimesh.creation.icosphere(subdivisions=2)
sheet = trimesh.Trimesh([[0, 0, 0], [1, 0, 0.2], [0, 1, 0], [1, 1, 0]], [[0, 1, 2], [3, 2, 1]], process=False)
for mesh in (ball, trimesh.Trimesh(ball.vertices, ball.faces[:-30], process=False), sheet, ball + sheet):
    voxelize(mesh, resolution=32, field="tsdf")
assert sum(before) and before == [len(f.signatures) for f in loops], (before, [len(f.signatures) for f in loops])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr


def test_the_report_names_the_method(tmp_path: Path) -> None:
    ball = trimesh.creation.icosphere(subdivisions=3)
    thing = trimesh.util.concatenate([ball, trimesh.creation.box((3, 0.01, 0.01))])
    bowl = trimesh.Trimesh(ball.vertices, ball.faces[np.argsort(ball.triangles_center[:, 1])[:-60]])
    for name, mesh in (("ball", ball), ("thing", thing), ("bowl", bowl)):
        (tmp_path / "in" / "c").mkdir(parents=True, exist_ok=True)
        mesh.export(tmp_path / "in" / "c" / f"{name}.ply")
    prepare(tmp_path / "in", tmp_path / "out", resolution=16, workers=0)
    methods = {line["source"]: line["method"] for line in report(tmp_path / "out")}
    assert methods == {"c/ball.ply": "winding", "c/bowl.ply": "vote", "c/thing.ply": "winding + thin"}


def test_changed_and_deleted_meshes_are_redone_and_no_others(tmp_path: Path) -> None:
    meshes, out = write_meshes(tmp_path / "meshes"), tmp_path / "out"
    prepare(meshes, out, resolution=16, workers=0)
    trimesh.creation.cylinder(1, 1).export(meshes / "box" / "box_1.obj")
    (meshes / "ball" / "ball_0.stl").unlink()
    summary = prepare(meshes, out, resolution=16, workers=0)
    assert summary.num_ok == 5 and summary.num_reused == 4
    prepare(meshes, tmp_path / "fresh", resolution=16, workers=0)
    assert files_of(out) == files_of(tmp_path / "fresh")
    cached = [path.stem for path in (out / ".cache").glob("*/*.grid")]
    assert len(cached) == 5, "grids that no mesh has any more are gone"


def test_equal_grids_never_lie_in_two_splits(tmp_path: Path) -> None:
    meshes = tmp_path / "in"
    for i in range(40):
        path = meshes / "c" / f"{i}.obj"
        path.parent.mkdir(parents=True, exist_ok=True)
        trimesh.creation.box((1, 0.3 + 0.2 * (i % 3), 0.5)).export(path)
    prepare(meshes, tmp_path / "out", resolution=16, workers=0, splits={"c/7.obj": "test"})
    shapes = read_manifest(tmp_path / "out").shapes
    splits: dict[str, set[str]] = {}
    for shape in shapes:
        splits.setdefault(shape.grid_sha256, set()).add(shape.split)
    assert len(splits) == 3 and all(len(found) == 1 for found in splits.values())
    decided = next(shape.grid_sha256 for shape in shapes if shape.id == "c/7.obj")
    assert splits[decided] == {"test"}


def test_splits_that_were_given_to_one_grid_in_two_ways_stay_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    meshes = tmp_path / "in"
    names = ["chair/a.obj", "chair/test/b.obj", "chair/train/a.obj", "chair/train/other.obj"]
    for name in names:
        (meshes / name).parent.mkdir(parents=True, exist_ok=True)
        trimesh.creation.box((1, 0.8 if "other" in name else 0.5, 0.5)).export(meshes / name)
    prepare(meshes, tmp_path / "out", resolution=16, workers=0)
    found = {shape.id: shape.split for shape in read_manifest(tmp_path / "out").shapes}
    assert found == dict(zip(names, ["test", "test", "train", "train"], strict=True))
    assert "1 shapes have the grid of one that was given another split" in caplog.text
    assert "chair/test/b.obj is in test, chair/train/a.obj in train" in caplog.text
    caplog.clear()
    prepare(meshes, tmp_path / "out", resolution=16, workers=0, splits={"chair/train/a.obj": "test"})
    assert "another split" not in caplog.text


def test_limits_skip_a_mesh_with_its_reason(tmp_path: Path) -> None:
    meshes, out = write_meshes(tmp_path / "meshes"), tmp_path / "out"
    prepare(meshes, out, resolution=16, workers=0)
    prepare(meshes, out, resolution=16, workers=0, limits=MeshLimits(max_faces=100))
    reasons = {line["source"]: line.get("reason") for line in report(out)}
    assert "faces, more than the limit of 100" in reasons["ball/ball_1.stl"] and not reasons["box/box_0.obj"]
    with pytest.raises(DataError):
        prepare(meshes, out, resolution=16, workers=0, limits=MeshLimits(max_bytes=100))
    with pytest.raises(ConfigError, match="max_faces=0"):
        MeshLimits(max_faces=0)


def test_a_mesh_that_eats_memory_is_lost_alone(tmp_path: Path) -> None:
    """A file of a million vertices that needs more than a worker may take."""
    meshes = write_meshes(tmp_path / "meshes", num=1)
    vertices = np.arange(3 * 1_500_000).reshape(-1, 3) % 997
    faces = np.arange(3 * 500_000).reshape(-1, 3)
    trimesh.Trimesh(vertices, faces, process=False).export(meshes / "box" / "vast.ply", encoding="ascii")
    summary = prepare(meshes, tmp_path / "out", resolution=16, workers=2, limits=MeshLimits(max_memory=256 << 20))
    (lost,) = (line for line in report(tmp_path / "out") if line["status"] == "skipped")
    assert summary.num_ok == 2 and lost["source"] == "box/vast.ply"
    assert "needs more memory than it may take" in lost["reason"]


def test_two_runs_on_one_folder_refuse_each_other(tmp_path: Path) -> None:
    meshes, out = write_meshes(tmp_path / "meshes"), tmp_path / "out"
    prepare(meshes, out, resolution=16, workers=0)
    before = files_of(out)
    holder = (
        "import sys, time; from shapediff.files import exclusive\n"
        f"with exclusive({str(out / '.cache' / 'lock')!r}): print('held', flush=True); time.sleep(60)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, "-c", holder], stdout=subprocess.PIPE, env=environment) as process:
        assert process.stdout is not None and process.stdout.readline() == b"held\n"
        with pytest.raises(DataError, match="another process is writing"):
            prepare(meshes, out, resolution=32, workers=0)
        np.save(tmp_path / "a.npy", np.ones((4, 4, 4), dtype=bool))
        with pytest.raises(DataError, match="another process is writing"):
            import_voxels(tmp_path / "a.npy", out)
        process.kill()
    assert files_of(out) == before
    with exclusive(out / ".cache" / "lock"):
        pass  # the system freed it


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_full_disk_leaves_the_old_data_set_and_can_be_continued(tmp_path: Path, num_workers: int) -> None:
    """A file size limit is the full disk: the system itself refuses the write, in workers and parent alike."""
    meshes, out = write_meshes(tmp_path / "meshes"), tmp_path / "out"
    prepare(meshes, out, resolution=8, workers=0)
    before = files_of(out)
    command = [sys.executable, str(ROOT / "data_tools" / "prepare.py"), str(meshes), str(out), "--resolution", "16"]

    def fill_disk_after(num_bytes: int) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, "--workers", str(num_workers)],
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, num_bytes)),
            capture_output=True,
            text=True,
        )

    refused = set()
    for num_bytes in (200, 1500, 2500):  # less than a cached grid, than the report, than a shard
        done = fill_disk_after(num_bytes)
        assert (
            done.returncode == 2 and "cannot be written" in done.stdout and "run the same command again" in done.stdout
        )
        assert files_of(out) == before and not verify_dataset(out).damaged
        refused.add(done.stdout.split("cannot be written")[0][-30:])
    assert subprocess.run(command, capture_output=True).returncode == 0
    prepare(meshes, tmp_path / "fresh", resolution=16, workers=0)
    assert files_of(out) == files_of(tmp_path / "fresh")


@pytest.mark.parametrize("when", ["shard", "manifest", "report"])
def test_a_disk_that_fills_at_any_file_keeps_what_was_there(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    meshes, out = write_meshes(tmp_path / "meshes"), tmp_path / "out"
    prepare(meshes, out, resolution=8, workers=0)
    before = files_of(out)
    real = shards.write_bytes

    def full(path: Path, content: bytes) -> None:
        if when in str(path.relative_to(out)):
            raise OSError(28, "No space left on device")
        real(path, content)

    for module in (shards, mesh_job, data_report):
        monkeypatch.setattr(module, "write_bytes", full)
    with pytest.raises(DataError, match="No space left on device"):
        prepare(meshes, out, resolution=16, workers=0)
    after = files_of(out)
    assert all(after[name] == content for name, content in before.items())
    assert not verify_dataset(out).damaged
    monkeypatch.undo()
    prepare(meshes, out, resolution=16, workers=0)
    assert ShapeDataset(out).resolution == 16


@pytest.mark.parametrize("when", ["shards", "manifest", "report"])
def test_a_disk_that_fills_under_an_import_keeps_what_was_there(
    tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, grids = tmp_path / "out", np.random.default_rng(0).random((5, 8, 8, 8)) < 0.3
    np.save(tmp_path / "a.npy", grids)
    import_voxels(tmp_path / "a.npy", out)
    before, real = files_of(out), shards.write_bytes

    def full(path: Path, content: bytes) -> None:
        if when in str(path.relative_to(out)):
            raise OSError(28, "No space left on device")
        real(path, content)

    for module in (shards, data_report):
        monkeypatch.setattr(module, "write_bytes", full)
    with pytest.raises(DataError, match=r"cannot be written: .*No space left on device.*run the same command again$"):
        import_voxels(tmp_path / "a.npy", out, up="z")
    after = files_of(out)
    assert all(after[name] == content for name, content in before.items())
    assert not verify_dataset(out).damaged


def test_strict_and_the_status_of_the_command(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.zip", {"chair/a.obj": BOX, "chair/b.obj": b"nothing", "../c.obj": BOX})
    command = [
        sys.executable,
        str(ROOT / "data_tools" / "prepare.py"),
        str(archive),
        str(tmp_path / "out"),
        "--resolution",
        "16",
    ]
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert subprocess.run([*command, "--strict"], capture_output=True).returncode == 1
    lines = [json.loads(line) for line in (tmp_path / "out" / "report.jsonl").read_text().splitlines()]
    assert {line["source"]: line["status"] for line in lines} == {
        "chair/a.obj": "ok",
        "chair/b.obj": "skipped",
        "../c.obj": "skipped",
    }
    only_bad = pack(tmp_path / "b.zip", {"chair/b.obj": b"nothing"})
    command[2:4] = [str(only_bad), str(tmp_path / "out2")]
    assert subprocess.run(command, capture_output=True).returncode == 2
