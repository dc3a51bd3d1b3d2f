"""What a run shows and leaves behind: a progress bar, metrics.jsonl, TensorBoard, pictures, and how it was started."""

from __future__ import annotations

import json
import logging
import math
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch.utils.tensorboard import SummaryWriter

from shapediff.engine.config import LoopConfig
from shapediff.engine.exporting import duration
from shapediff.engine.wandb_run import WandbRun
from shapediff.files import write_json, write_text
from shapediff.hardware import GIB, accelerator_of

log = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
SECONDS_BETWEEN_LINES = 30.0
Metric = float | Sequence[float | None] | Mapping[str, float | None]
"""A number, or a curve of them by position or by name; None where there is none."""

PACKAGES = ("shapediff", "torch", "deepspeed", "numpy", "einops", "safetensors", "hydra-core")


class Reporter:
    """The eyes of rank 0: a bar on a terminal, a line now and then elsewhere, and files under the run's folder."""

    def __init__(self, run: Path, loop: LoopConfig, *, first_step: int, wandb: WandbRun | None = None) -> None:
        run.mkdir(parents=True, exist_ok=True)
        _drop_metrics_after(run / METRICS_FILE, first_step)
        self._run = run
        self._loop = loop
        self._metrics = (run / METRICS_FILE).open("a", encoding="utf-8")
        self._board = SummaryWriter(str(run / "tensorboard"), purge_step=first_step + 1)
        self._wandb = wandb
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[shown]}"),
            console=self._console, disable=not self._console.is_terminal,
        )  # fmt: skip
        self._task = self._bar.add_task("", total=loop.steps, completed=first_step, shown="")
        self._bar.start()
        self._last_line = self._last_step = self._last_share = time.monotonic()
        self._last_total = 0.0

    def step(self, step: int, *, loss: float, grad_norm: float, memory: int, seconds_left: float) -> float:
        """Show where the run is, `memory` in bytes; returns the samples a second since the step before, all ranks together."""
        now = time.monotonic()
        speed, self._last_step = self._loop.batch_size / max(now - self._last_step, 1e-9), now
        shown = (
            f"loss {loss:.4f}  gradient {grad_norm:.3g}  {speed:.1f} samples/s  {memory / GIB:.1f} GiB  "
            f"{duration(seconds_left)} left"
        )
        self._bar.update(self._task, completed=step, shown=shown)
        if self._bar.disable and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            log.info("step %d of at most %d  %s", step, self._loop.steps, shown)
        return speed

    def share_of_time(self, total: float) -> float:
        """The share of the time since this was last asked by which `total`, seconds that only grow, has grown."""
        now = time.monotonic()
        share = (total - self._last_total) / max(now - self._last_share, 1e-9)
        self._last_share, self._last_total = now, total
        return share

    def metrics(self, step: int, values: Mapping[str, Metric]) -> None:
        """Append a line to metrics.jsonl, and to TensorBoard and Weights & Biases, there a curve as one chart a point."""
        self._metrics.write(json.dumps({"step": step, **values}) + "\n")
        self._metrics.flush()
        points = dict(_points(values))
        for name, value in points.items():
            self._board.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.scalars(step, points)

    def samples(self, step: int, signals: np.ndarray, captions: list[str], *, columns: int) -> None:
        """Draw signals (n, R, R, R) as one contact sheet, samples/step-N.png."""
        from shapediff.geometry.render import contact_sheet, render_voxels, save_png

        pictures = [render_voxels(signal, size=160) for signal in signals]
        sheet = contact_sheet(pictures, columns=columns, captions=captions)
        save_png(sheet, self._run / "samples" / f"step-{step:08d}.png")
        self._board.add_image("samples", sheet, step, dataformats="HWC")
        if self._wandb is not None:
            self._wandb.picture(step, "samples", sheet)

    def close(self) -> None:
        """Finish the bar and the files."""
        self._bar.stop()
        self._metrics.close()
        self._board.close()
        if self._wandb is not None:
            self._wandb.close()


def record_start(run: Path, config: dict[str, object], *, device: torch.device, world_size: int) -> None:
    """Leave config.json, and in started.jsonl the command, versions, git revision and machine of this start.

    Nothing of the environment, which may hold keys, is written.
    """
    write_json(run / "config.json", config)
    facts = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": shlex.join([Path(sys.executable).name, *sys.argv]),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "git_revision": _git_revision(),
        "host": platform.node(),
        "ranks": world_size,
        "device": accelerator_of(device).name,
        "threads": torch.get_num_threads(),
    }
    with (run / "started.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(facts) + "\n")


def _points(values: Mapping[str, Metric]) -> Iterator[tuple[str, float]]:
    """Every number there is, under its own name: those of a curve are curve/0 or curve/chair."""
    for name, value in values.items():
        if isinstance(value, int | float):
            yield name, value
            continue
        curve = value.items() if isinstance(value, Mapping) else enumerate(value)
        yield from ((f"{name}/{key}", point) for key, point in curve if point is not None)


def _drop_metrics_after(path: Path, step: int) -> None:
    """A resumed run repeats the steps after its state: their old lines would stand twice."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    write_text(path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))


def _step_of(line: str) -> float:
    """The step of a line of metrics; past every step where a kill cut the line short."""
    try:
        return json.loads(line)["step"]
    except json.JSONDecodeError:
        return math.inf


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _git_revision() -> str | None:
    root = Path(__file__).resolve().parents[2]
    try:
        answer = subprocess.run(
            ["git", "-C", str(root), "describe", "--always", "--dirty"], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None
