"""The command line of evaluation, and folders of anyone's shapes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from shapediff import evaluate as cli
from shapediff.checkpoint import ExportConfig, write_export
from shapediff.data.manifest import Split
from shapediff.data.packing import pack_grid
from shapediff.data.shape_folder import read_shapes
from shapediff.data.shards import ShardWriter
from shapediff.errors import ConfigError, DataError
from shapediff.evaluation import classifier
from shapediff.held_out import held_out_scores
from shapediff.methods import ShapeVAEConfig
from shapediff.models import VAE3DConfig
from shapediff.pipeline import ShapePipeline
from tests.evaluation.test_evaluator import shapes
from tests.test_checkpoint import export

CLASSES = ["chair", "椅子"]


@pytest.fixture
def dataset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Balls and boxes at 8^3 under the class names of the tests' small export; a classifier of few steps."""
    monkeypatch.setattr(classifier.trained_classifier, "__kwdefaults__", {"num_seen": 320})
    writer = ShardWriter(tmp_path / "data", resolution=8, field="occupancy", truncation_voxels=0, classes=CLASSES)
    for split, num in (("train", 12), ("val", 3), ("test", 3)):
        found = shapes(num, len(split))
        for i, (grid, label) in enumerate(zip(found.grids[:, ::2, ::2, ::2], found.labels, strict=True)):
            row = pack_grid(grid, field="occupancy")
            writer.add(row, id=f"{split}{i}", source="made", class_name=CLASSES[label], split=split)  # type: ignore[arg-type]
    writer.finish()
    return tmp_path / "data"


def config(path: Path) -> ExportConfig:
    return export(path)[0]


def test_from_a_checkpoint_to_a_report_and_again(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config(tmp_path / "run" / "export")
    arguments = ["--checkpoint", str(tmp_path / "run"), "--data", str(dataset), "--num", "4", "--steps", "2"]
    arguments += ["--guidance", "2", "--points", "64", "--device", "cpu"]
    assert cli.main(arguments) == 0
    assert "| 1-NNA CD, % |" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "evaluation" / "report.json").read_text(encoding="utf-8"))
    assert report["counts"] == {"chair": 4, "椅子": 4}
    assert report["settings"]["sampling"]["guidance_scale"] == 2
    assert report["settings"]["sampling"]["num_steps"] == 2
    assert report["settings"]["seconds_each"] > 0
    assert report["scores"]["overall"]["bits"]["samples"]["value"] > 0
    # Again: neither sampled nor trained nor measured a second time, and the same.
    for name in ("pipeline.ShapePipeline.stream", "evaluation.classifier.train", "evaluation.distances._by_rows"):
        monkeypatch.setattr(f"shapediff.{name}", None)
    assert cli.main(arguments) == 0
    again = json.loads((tmp_path / "run" / "evaluation" / "report.json").read_text(encoding="utf-8"))
    assert again["scores"] == report["scores"]
    assert again["settings"]["sampling"] == report["settings"]["sampling"]
    assert sorted(path.name for path in (tmp_path / "run" / "evaluation").glob("report*")) == [
        "report.json",
        "report.md",
    ]


def test_an_autoencoder_is_measured_by_what_it_gives_back(dataset: Path, tmp_path: Path) -> None:
    """Beside what its prior makes: the mean IoU over all held-out shapes, of the shape itself and what comes back."""
    torch.manual_seed(0)
    model = VAE3DConfig(width=8, width_multipliers=(1, 1))
    config = ExportConfig(8, "occupancy", tuple(CLASSES), ShapeVAEConfig(), model)
    networks = config.build_method().build_networks(model)
    write_export(tmp_path / "vae", config, {"vae": networks["vae"].state_dict()}, dtype=torch.float32)
    arguments = ["--checkpoint", str(tmp_path / "vae"), "--data", str(dataset), "--num", "4", "--points", "64"]
    assert cli.main([*arguments, "--distances", "iou", "--device", "cpu"]) == 0
    scores = json.loads((tmp_path / "vae" / "evaluation" / "report.json").read_text(encoding="utf-8"))["scores"]
    held_out = [cli.read_split(dataset, split) for split in ("val", "test")]
    grids = np.concatenate([part.grids for part in held_out])
    pipeline, given = ShapePipeline.from_pretrained(tmp_path / "vae"), torch.from_numpy(grids * 2.0 - 1)
    again = pipeline.reconstruct(given)
    assert "bits" not in scores["overall"]
    with pytest.raises(ConfigError, match="how likely"):
        pipeline.bits_per_voxel(given, ["chair"] * len(given))
    both, any_ = ((f(grids, again.numpy() > 0)).sum((1, 2, 3)) for f in (np.logical_and, np.logical_or))
    found = scores["overall"]["reconstruction"]["samples"]
    assert found["value"] == pytest.approx((both / any_).mean()) and 0 < found["value"] < 1
    labels = np.concatenate([part.labels for part in held_out])
    assert scores["chair"]["reconstruction"]["samples"]["value"] == pytest.approx((both / any_)[labels == 0].mean())


def test_what_is_said_of_held_out_shapes_is_the_mean_of_the_classes_in_any_batches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though there are three chairs for each other shape; and the noise of the bound is that of the shape, not of its batch."""
    config(tmp_path / "run")
    pipeline = ShapePipeline.from_pretrained(tmp_path / "run")
    writer = ShardWriter(tmp_path / "data", resolution=8, field="occupancy", truncation_voxels=0, classes=CLASSES)
    for i in range(12):
        grid = np.random.default_rng(i).random((8, 8, 8)) < 0.4
        split: Split = "val" if i % 2 else "test"
        writer.add(
            pack_grid(grid, field="occupancy"), id=f"{i}", source="made", class_name=CLASSES[i % 4 == 0], split=split
        )
    writer.finish()
    given = {"splits": ("val", "test"), "classes": CLASSES}
    found = held_out_scores(pipeline, tmp_path / "data", **given)["bits"]  # type: ignore[arg-type]
    chair, other, overall = (found[name] for name in (*CLASSES, "overall"))
    assert overall.value == pytest.approx((chair.value + other.value) / 2)
    assert overall.error == pytest.approx((chair.error**2 + other.error**2) ** 0.5 / 2)
    monkeypatch.setattr("shapediff.held_out.BATCH_SIZE", 2)
    again = held_out_scores(pipeline, tmp_path / "data", **given)["bits"]  # type: ignore[arg-type]
    for name in found:
        assert again[name].value == pytest.approx(found[name].value, rel=1e-4)
    reseeded = held_out_scores(pipeline, tmp_path / "data", **given, seed=1)["bits"]  # type: ignore[arg-type]
    assert reseeded["overall"].value != pytest.approx(found["overall"].value, rel=1e-4)
    one = torch.from_numpy((np.random.default_rng(0).random((8, 8, 8)) < 0.4) * 2.0 - 1).expand(2, -1, -1, -1)
    first, second = pipeline.bits_per_voxel(one, ["chair"] * 2).tolist()
    assert first != pytest.approx(second, rel=1e-4)  # two draws of the noise of one shape


def test_a_class_without_held_out_shapes_is_left_out_and_said(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    config(tmp_path / "run")
    writer = ShardWriter(tmp_path / "few", resolution=8, field="occupancy", truncation_voxels=0, classes=CLASSES)
    for i in range(24):
        name = CLASSES[i >= 20]
        split: Split = "test" if name == "chair" and i % 2 else "train"
        row = pack_grid(np.random.default_rng(i).random((8, 8, 8)) < 0.4, field="occupancy")
        writer.add(row, id=f"{i}", source="made", class_name=name, split=split)
    writer.finish()
    base = ["--checkpoint", str(tmp_path / "run"), "--data", str(tmp_path / "few"), "--points", "64", "--steps", "1"]
    assert cli.main([*base, "--num", "4", "--distances", "iou"]) == 0
    assert f"{CLASSES[1]} has 0 held out, 4 to train on" in caplog.text
    report = json.loads((tmp_path / "run" / "evaluation" / "report.json").read_text(encoding="utf-8"))
    assert report["counts"] == {"chair": 4}
    assert cli.main([*base, "--class", CLASSES[1]]) == 2
    assert "no class has 4 shapes or more of each kind" in capsys.readouterr().err


def test_a_model_that_is_not_in_this_folder_leaves_its_name_free(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of its name would be taken for it the next time."""
    config(tmp_path / "pretrained" / "little")
    monkeypatch.setattr("shapediff.hub.PRETRAINED_FOLDER", tmp_path / "pretrained")
    monkeypatch.chdir(tmp_path)
    base = ["--checkpoint", "little", "--data", str(dataset), "--num", "4", "--points", "64", "--steps", "1"]
    for _ in range(2):
        assert cli.main([*base, "--distances", "iou"]) == 0
    assert not Path("little").exists() and Path("evaluation/little/report.json").is_file()


def test_reports_of_other_settings_stay(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Beside, under the next number; a folder that was named holds one report, and says what it is of."""
    config(tmp_path / "run" / "export")
    base = ["--checkpoint", str(tmp_path / "run"), "--data", str(dataset), "--num", "4", "--points", "64"]
    steps, folder = ("1", "2", "1"), tmp_path / "run" / "evaluation"
    for num_steps in steps:
        assert cli.main([*base, "--distances", "iou", "--steps", num_steps]) == 0
    found = [json.loads((folder / f"report{n}.json").read_text(encoding="utf-8")) for n in ("", "-2")]
    assert [report["settings"]["sampling"]["num_steps"] for report in found] == [1, 2]
    assert not (folder / "report-3.json").exists()
    assert "report-2.md" in capsys.readouterr().out
    out = ["--distances", "iou", "--out", str(folder)]
    before = (folder / "report.json").read_bytes()
    assert cli.main([*base, *out, "--steps", "2"]) == 2
    assert "is a report of sampling.num_steps=1, this command says sampling.num_steps=2" in capsys.readouterr().err
    assert (folder / "report.json").read_bytes() == before


def test_a_folder_of_training_shapes_scores_as_training_shapes(dataset: Path, tmp_path: Path) -> None:
    folder = tmp_path / "peer"
    train = cli.read_split(dataset, "train")
    for label, name in enumerate(CLASSES):
        (folder / name).mkdir(parents=True)
        grids = train.of_class(label).grids
        np.savez(folder / name / "all.npz", samples=np.where(grids, 0.3, -0.9).astype(np.float32))
    arguments = ["--samples", str(folder), "--data", str(dataset), "--points", "64", "--out", str(tmp_path / "out")]
    assert cli.main(arguments) == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text(encoding="utf-8"))
    assert report["counts"] == dict.fromkeys(CLASSES, 6)
    assert report["scores"]["overall"]["novelty"]["samples"]["value"] == 0
    assert report["scores"]["overall"]["to-train"]["samples"]["value"] == 0


def test_errors_are_one_line(dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config(tmp_path / "run" / "export")
    base = ["--data", str(dataset), "--checkpoint", str(tmp_path / "run")]
    for more, reason in (
        (["--class", "sofa"], "class 'sofa' is unknown"),
        (["--num", "1"], "error: --num 1 must be at least 4"),
        (["--points", "3"], "error: --points 3 must be at least 4"),
        (["--guidance-rescale", "7"], "guidance_rescale=7"),
        (["--temperature", "0.5"], "temperature (--temperature) is for autoregressive models"),
    ):
        assert cli.main([*base, *more]) == 2
        assert reason in capsys.readouterr().err
    few = tmp_path / "few" / "chair"
    few.mkdir(parents=True)
    np.save(few / "a.npy", np.ones((2, 8, 8, 8), bool))
    samples = ["--data", str(dataset), "--samples", str(few.parent)]
    assert cli.main(samples) == 2
    assert "no class has 4 shapes or more of each kind: chair has 2 samples, 6 held out, 12" in capsys.readouterr().err
    assert cli.main([*samples, "--steps", "3"]) == 2
    assert "belong to --checkpoint" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert cli.main(["--data", str(dataset), "--samples", str(tmp_path / "empty")]) == 2
    assert "holds no shape" in capsys.readouterr().err


def found_in(folder: Path, **options: object) -> tuple[list[tuple[str, str]], list[str]]:
    skipped: list[str] = []
    arguments = {"classes": ["chair", "chairlift"], "resolution": 8, **options}
    read = read_shapes(folder, on_skip=lambda path, reason: skipped.append(f"{path.name}: {reason}"), **arguments)  # type: ignore[arg-type]
    return [(shape.file.name, shape.class_name) for shape in read], skipped


def test_classes_come_from_the_manifest_the_folder_or_the_name(tmp_path: Path) -> None:
    box = trimesh.creation.box((1, 2, 3))
    for name in ("listed.obj", "chair/any.stl", "Chair_001.ply", "chairlift-2.off", "sofa_3.obj", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        if name.endswith("txt"):
            (tmp_path / name).write_text("no shape")
        else:
            box.export(tmp_path / name)
    lines = [{"file": "listed.obj", "class": "chairlift"}, {"file": None, "class": "chair"}]
    (tmp_path / "manifest.json").write_text(json.dumps({"shapes": lines}))
    found, skipped = found_in(tmp_path)
    assert found == [
        ("Chair_001.ply", "chair"),
        ("any.stl", "chair"),
        ("chairlift-2.off", "chairlift"),
        ("listed.obj", "chairlift"),
    ]
    assert len(skipped) == 1
    assert skipped[0].startswith("sofa_3.obj: none of the classes chair, chairlift")
    assert found_in(tmp_path, num=1)[0] == [("Chair_001.ply", "chair"), ("chairlift-2.off", "chairlift")]
    assert len(found_in(tmp_path / "chair", classes=["stool"])[0]) == 1  # one class alone
    (tmp_path / "manifest.json").write_text("[1]")
    with pytest.raises(DataError, match="no list of shapes"):
        found_in(tmp_path)
    with pytest.raises(DataError, match="no folder"):
        found_in(tmp_path / "nowhere")


def damaged_npy(header: str) -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode()


def test_grids_and_meshes_come_out_as_they_went_in(tmp_path: Path) -> None:
    grid = shapes(1, 4).grids[0][::2, ::2, ::2]
    np.save(tmp_path / "chair_a.npy", np.stack([grid, ~grid]))
    np.save(tmp_path / "chair_b.npy", np.where(grid, 0.2, -0.7))  # a signal: inside above 0
    np.save(tmp_path / "chair_c.npy", np.where(grid, 0.7, 0.2))  # a chance: inside above 0.5
    np.savez(tmp_path / "chair_d.npz", packed=np.packbits(grid.reshape(1, -1), axis=1))
    np.save(tmp_path / "chair_e.npy", np.zeros((4, 4, 4), bool))
    (tmp_path / "chair_f.obj").write_text("v 0 0 0\n")
    (tmp_path / "chair_g.npy").write_bytes(damaged_npy("{'descr': '<f4', 'fortran_order': False, 'shape': (8, 8, 8"))
    (tmp_path / "chair_h.npy").write_bytes(
        damaged_npy("{'descr': '<f4', 'fortran_order': False, 'shape': (9999, 999, 999, 99), }")
    )
    np.savez(tmp_path / "chair_i.npz", voxels=np.where(grid, 0.7, 0.2), voxels_of_others=-np.ones((2, 2)))
    skipped: list[str] = []
    found = list(
        read_shapes(tmp_path, classes=["chair"], resolution=8, on_skip=lambda path, reason: skipped.append(reason))
    )
    expected = [grid, ~grid, grid, grid, grid, grid]
    assert len(found) == len(expected)
    for shape, one in zip(found, expected, strict=True):
        np.testing.assert_array_equal(shape.grid, one)
        assert shape.is_closed is None
    assert "4 x 4 x 4; the data set's are 8^3" in skipped[0]
    assert "no faces" in skipped[1]
    assert len(skipped) == 4
    ball = trimesh.creation.icosphere(subdivisions=3)
    ball.update_faces(np.arange(len(ball.faces)) > 3)
    (tmp_path / "balls").mkdir()
    ball.export(tmp_path / "balls" / "open.ply")
    (shape,) = read_shapes(tmp_path / "balls", classes=["ball"], resolution=16, on_skip=lambda *_: None)
    assert shape.is_closed is False
    assert shape.grid.mean() == pytest.approx(np.pi / 6 * (15 / 16) ** 3, rel=0.05)
