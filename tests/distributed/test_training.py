"""Whole training runs as users start them: one process, two ranks, stopped and resumed. Each start takes some ten seconds."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shapediff.checkpoint import read_export
from shapediff.data.dataset import ShapeDataset
from shapediff.data.importing import import_voxels
from shapediff.engine.batches import Batches
from shapediff.engine.config import TrainConfig
from shapediff.engine.finetuning import exported_weights
from shapediff.grid.morton import morton_to_dense
from shapediff.pipeline import ShapePipeline

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = [
    "experiment=cpu",
    "model.width=8",
    "model.width_multipliers=[1,2]",
    "model.attention_levels=[1]",
    "deepspeed.precision=float32",
    "train.steps=8",
    "train.batch_size=4",
    "train.log_every=1",
    "train.sample_every=0",
    "train.checkpoint_every=4",
    "train.ema_decay=0.9",
    "optimizer.warmup_steps=2",
]
LONG = ["train.steps=100", "train.checkpoint_every=1"]
"""Long enough, and slow enough by saving each step, for a signal to arrive in the middle."""

TIMEOUT = 300


def command(data: Path, run: Path, *settings: str, ranks: int = 0) -> list[str]:
    """`python launch/train.py ...`, or the deepspeed launcher with `ranks` ranks."""
    script = [str(ROOT / "launch" / "train.py"), *SETTINGS, f"data.path={data}", f"run_dir={run}", *settings]
    if not ranks:
        return [sys.executable, *script]
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    launcher = Path(sys.executable).with_name("deepspeed")
    return [str(launcher), "--num_gpus", str(ranks), "--master_port", str(port), *script]


def environment() -> dict[str, str]:
    """One thread a rank, so that sums have one order; the CPU, so that every machine tests the same."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    return {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PATH": path}


def train(*arguments: object, ranks: int = 0) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command(*arguments, ranks=ranks),  # type: ignore[arg-type]
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        env=environment(),
        cwd=arguments[1].parent,  # type: ignore[attr-defined]
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def shared_memory() -> set[Path]:
    """What DeepSpeed would leave in memory."""
    return set(Path("/dev/shm").glob("deepspeed_allreduce_buffer_*"))


def metrics(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> list[float]:
    lines = metrics(run)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def errors(run: Path) -> np.ndarray:
    """(lines, 10 buckets of timesteps and 2 classes), NaN where no sample fell."""
    rows = [[*line["error_by_timestep"], *line["error_by_class"].values()] for line in metrics(run)]
    return np.array(rows, dtype=np.float64)


@pytest.fixture(scope="module")
def whole(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one process, start to end."""
    run = tmp_path_factory.mktemp("whole") / "run"
    train(data, run)
    return run


@pytest.fixture(scope="module")
def long(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A longer run of one process, never stopped."""
    run = tmp_path_factory.mktemp("long") / "run"
    train(data, run, *LONG)
    return run


def test_a_run_learns_and_leaves_what_it_promises(whole: Path) -> None:
    found = losses(whole)
    assert len(found) == 8
    assert all(np.isfinite(found))
    assert found[0] == pytest.approx(1.0, abs=0.1)  # the network starts at 0 and eps has power 1
    assert sorted(p.name for p in (whole / "state").iterdir()) == ["step-00000004", "step-00000008"]
    assert json.loads((whole / "config.json").read_text())["train"]["steps"] == 8
    started = json.loads((whole / "started.jsonl").read_text())
    assert "launch/train.py" in started["command"]
    line = metrics(whole)[-1]
    assert 0 <= line["data_wait"] < 1 and 0.1 < line["memory_gib"] < 10
    assert list((whole / "tensorboard").iterdir())
    shapes = ShapePipeline.from_pretrained(whole)(2, label="ball", num_steps=2)
    assert shapes.voxels.shape == (2, 16, 16, 16)


def test_two_ranks_see_what_one_sees(data: Path, whole: Path, tmp_path: Path) -> None:
    """Started by DeepSpeed's launcher: the same losses, buckets and weights. Every stage: test_state.py."""
    shared_before = shared_memory()
    train(data, tmp_path / "run", "deepspeed=zero3", ranks=2)
    assert shared_memory() <= shared_before
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(whole), rtol=1e-5)
    np.testing.assert_allclose(
        errors(tmp_path / "run"), errors(whole), rtol=1e-4
    )  # the same samples in the same buckets
    one, two = (
        ShapePipeline.from_pretrained(run)._networks["float32"]["denoiser"].state_dict()
        for run in (whole, tmp_path / "run")
    )
    for key, value in one.items():
        # Adam turns rounding into steps of up to lr = 1e-3 where a gradient is nearly 0; eight steps were made.
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=2e-3, msg=key)


def test_the_other_denoiser_trains_from_the_same_config(data: Path, tmp_path: Path) -> None:
    sizes = ["model.hidden_size=48", "model.depth=2", "model.num_heads=2"]
    unet = [setting for setting in SETTINGS if setting.startswith("model.")]
    arguments = [a for a in command(data, tmp_path / "run", "model=dit3d_small", *sizes) if a not in unet]
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT, env=environment(), cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-4000:]
    assert losses(tmp_path / "run")[0] == pytest.approx(1.0, abs=0.1)
    assert len(ShapePipeline.from_pretrained(tmp_path / "run")(1, label="bar", num_steps=2)) == 1


def test_accumulation_sees_what_one_batch_sees(data: Path, whole: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", "train.micro_batch_size=2")
    np.testing.assert_allclose(losses(tmp_path / "run"), losses(whole), rtol=1e-4)
    np.testing.assert_allclose(errors(tmp_path / "run"), errors(whole), rtol=1e-4)


def test_curves_cover_the_window_between_two_lines(data: Path, whole: Path, tmp_path: Path) -> None:
    """Eight steps in two lines: classes are balanced, so that a line's mean by class is that of the four steps' losses."""
    train(data, tmp_path / "run", "train.log_every=4")
    lines, steps = metrics(tmp_path / "run"), np.array(losses(whole)).reshape(2, 4)
    assert [line["step"] for line in lines] == [4, 8]
    found = errors(tmp_path / "run")
    assert found.shape == (2, 12)
    assert [line["error_by_class"].keys() for line in lines] == [{"ball", "bar"}] * 2
    # Under uniform weighting the error is the loss; 16 samples a line, 8 of each class.
    np.testing.assert_allclose(found[:, 10:].mean(1), steps.mean(1), rtol=1e-4)


def test_a_learned_variance_trains_and_samples(data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", "method.variance=learned", "sampling.sampler=ddpm")
    found = losses(tmp_path / "run")
    assert all(np.isfinite(found))
    assert np.mean(found) > np.nanmean(errors(tmp_path / "run")[:, 10:])  # the bound comes on top of the error
    shapes = ShapePipeline.from_pretrained(tmp_path / "run")(2, label="ball", num_steps=3)
    assert shapes.settings["sampler"] == "ddpm" and shapes.voxels.shape == (2, 16, 16, 16)


@pytest.mark.parametrize("ranks", [0, 2])
def test_stopped_and_resumed_is_the_same_run(data: Path, long: Path, tmp_path: Path, ranks: int) -> None:
    """SIGTERM saves at the next step; the same command goes on, with the losses of the run that was never stopped."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        command(data, run, *LONG, ranks=ranks),
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        cwd=tmp_path,
        start_new_session=True,
    )
    metrics, deadline = run / "metrics.jsonl", time.monotonic() + TIMEOUT
    while not (metrics.exists() and metrics.read_text().count("\n") >= 1):
        assert time.monotonic() < deadline
        assert process.poll() is None, process.stderr.read()  # type: ignore[union-attr]
        time.sleep(0.005)
    # To the whole group, as terminals and schedulers send it: the deepspeed command itself passes nothing on.
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=TIMEOUT)
    if not ranks:  # the launcher answers a signal with a status of its own
        assert process.returncode == 75
    assert len(losses(run)) < 100
    assert not (run / "export").exists()

    assert "resuming" in train(data, run, *LONG, ranks=ranks).stderr
    # One process repeats its sums bit for bit; two add them in another order, and 100 steps of Adam magnify it;
    # the losses of different batches differ by far more.
    np.testing.assert_allclose(losses(run), losses(long), rtol=0 if not ranks else 5e-2)


def test_a_run_starts_from_an_export(data: Path, whole: Path, tmp_path: Path) -> None:
    """Two ranks under stage 3, a class in another place and a new one: the first loss is that of the exported weights."""
    grids = {"bar": "bar", "slab": "bar", "ball": "ball"}
    (tmp_path / "grids").mkdir()
    shapes = {name: ShapeDataset(data, split=None) for name in grids}
    for name, old in grids.items():
        rows = np.flatnonzero(shapes[name].labels == shapes[name].classes.index(old))
        dense = morton_to_dense(shapes[name].batch(rows)["voxels"]).numpy() > 0
        np.savez(tmp_path / "grids" / f"{name}.npz", dense if name != "slab" else dense.transpose(0, 2, 1, 3))
    import_voxels(tmp_path / "grids", tmp_path / "voxels")

    start = f"train.init_from={whole}"
    train(tmp_path / "voxels", tmp_path / "run", start, "deepspeed=zero3", "optimizer.lr=1e-6", ranks=2)

    config = TrainConfig.from_dict(json.loads((tmp_path / "run" / "config.json").read_text()))
    dataset = ShapeDataset(tmp_path / "voxels", split="train")
    assert dataset.classes == ["ball", "bar", "slab"]
    export = replace(read_export(whole).config, classes=tuple(dataset.classes))
    method = export.build_method()
    networks = method.build_networks(export.model)
    networks["denoiser"].load_state_dict(exported_weights(str(whole), export)["denoiser"])
    with Batches(dataset, config, first_step=0, micro_batch_size=4, rank=0, world_size=1) as batches, torch.no_grad():
        (micro,) = batches.take()
        expected = float(method.loss(networks, micro.batch, micro.seeds).loss)
    assert losses(tmp_path / "run")[0] == pytest.approx(expected, rel=1e-5)
    facts = read_export(tmp_path / "run").config
    assert facts.classes == ("ball", "bar", "slab") and facts.training["started from"] == str(whole)


def test_a_typo_or_a_missing_data_set_is_one_clear_line(data: Path, tmp_path: Path) -> None:
    for arguments, message in (
        ((data, tmp_path / "a", "train.stepz=3"), "stepz"),
        ((data, tmp_path / "b", "train.steps=many"), "error: train.steps: expected int, found 'many'"),
        ((tmp_path / "nothing", tmp_path / "c"), "error: "),
        ((data, tmp_path / "d", "method.schedule.num_timesteps=10"), "num_steps=50 is more than the 10 timesteps"),
    ):
        done = subprocess.run(command(*arguments), capture_output=True, text=True, timeout=TIMEOUT, env=environment())
        assert done.returncode != 0
        assert message in done.stderr
        assert "Traceback" not in done.stderr


def test_a_build_that_was_killed_does_not_hang_the_next_run(tmp_path: Path) -> None:
    """PyTorch marks an operator's build by a file; killed, it leaves it, and everyone after would wait for it forever."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "DS_ACCELERATOR": "cpu",
        "TORCH_EXTENSIONS_DIR": str(tmp_path),
    }
    code = "from shapediff.engine import distributed; print(distributed.start())"
    subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=300, capture_output=True)
    folders = [path.parent for path in tmp_path.rglob("*.so")]
    assert folders
    for folder in folders:
        (folder / "lock").touch()
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=120, capture_output=True)
    assert done.stdout.decode().strip().endswith("cpu")
    assert not any((folder / "lock").exists() for folder in folders)
