"""Seconds a training step under DeepSpeed's ZeRO stages 0 to 3, as this engine runs them, beside plain torch DDP.

    python benchmarks/distributed.py [--ranks 2] [--resolution 16] [--batch-size 16] [--steps 20] [--out FILE.md]

All sides hold the same network, optimizer, batches, clipping and autocast in one process a rank, and take turns step by step, so
that whatever else the machine does hits them alike. Two comparisons: every side keeps an average of the weights, and none does.
Ours also finds out every step, over all ranks, the mean loss and whether a rank was told to stop; DDP reads its own loss.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from shapediff.data.dataset import ShapeDataset
from shapediff.data.importing import import_voxels
from shapediff.engine import distributed
from shapediff.engine.batches import Batches
from shapediff.engine.config import DataConfig, LoopConfig, TrainConfig
from shapediff.engine.distributed import DeepSpeedConfig
from shapediff.engine.trainer import Trainer
from shapediff.models import PRESETS

NUM_WARMUP_STEPS = 3


class Side(ABC):
    """A way to train, step by step."""

    def __init__(self, name: str, config: TrainConfig, device: torch.device) -> None:
        self.name = name
        self.config = config
        self.device = device
        self.keeps_average = True
        self.seconds: dict[bool, list[float]] = {True: [], False: []}
        self.cpu_seconds: dict[bool, list[float]] = {True: [], False: []}
        self.seconds_waited = 0.0

    def timed_step(self, batches: Batches, *, keeps_average: bool) -> None:
        """Take a step, all ranks starting together."""
        self.keeps_average = keeps_average
        distributed.barrier()
        start, cpu_start = time.perf_counter(), time.process_time()
        micro_batches = batches.take()
        waited = time.perf_counter() - start
        self.step(micro_batches)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[keeps_average].append(time.perf_counter() - start)
        self.cpu_seconds[keeps_average].append(time.process_time() - cpu_start)
        self.seconds_waited += waited

    def forget(self) -> None:
        """Drop the times so far: they were to warm up."""
        self.seconds, self.cpu_seconds = {True: [], False: []}, {True: [], False: []}
        self.seconds_waited = 0.0

    def times(self, keeps_average: bool) -> tuple[list[float], list[float]]:
        """Wall clock and processor time of each step."""
        return self.seconds[keeps_average], self.cpu_seconds[keeps_average]

    @abstractmethod
    def step(self, micro_batches: list[Any]) -> None:
        """One optimizer step."""


class Engine(Side):
    """This project's engine: what `Trainer.fit` does with a step."""

    def __init__(self, name: str, config: TrainConfig, device: torch.device) -> None:
        super().__init__(name, config, device)
        self.trainer = Trainer(config, device)
        update = self.trainer.ema.update
        self.trainer.ema.update = lambda: update() if self.keeps_average else None  # type: ignore[method-assign]

    def step(self, micro_batches: list[Any]) -> None:
        outputs, taken = self.trainer._step(micro_batches)
        _, _, seconds = self.trainer._agree(outputs, False, 0.0)
        self.trainer._advance(seconds, taken)


class PlainDdp(Side):
    """The same with torch alone."""

    def __init__(self, name: str, config: TrainConfig, device: torch.device) -> None:
        super().__init__(name, config, device)
        dataset = ShapeDataset(config.data.path, split="train", resolution=config.data.resolution)
        self.method = config.method.build(resolution=dataset.resolution, num_classes=len(dataset.classes))
        torch.manual_seed(config.train.seed)
        network: nn.Module = self.method.build_networks(config.model)["denoiser"].to(device)
        self.optimizer = config.optimizer.build(network)
        self.parameters = list(network.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        if distributed.world_size() > 1:
            network = nn.parallel.DistributedDataParallel(network, gradient_as_bucket_view=True)
        self.network = network

    def step(self, micro_batches: list[Any]) -> None:
        (micro,) = micro_batches
        here = micro.to(self.device)
        output = self.method.loss({"denoiser": self._denoise}, here.batch, here.seeds)  # type: ignore[dict-item]
        self.optimizer.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.optimizer.grad_clip)
        self.optimizer.step()
        if self.keeps_average:
            with torch.no_grad():
                torch._foreach_lerp_(self.average, self.parameters, 1 - self.config.train.ema_decay)
        output.loss.item()

    def _denoise(self, *inputs: Tensor) -> Tensor:
        with torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.deepspeed.autocast_dtype(self.device) is not None
        ):
            return self.network(*inputs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--resolution", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=16, help="of all ranks together")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each side, with and without an average")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if "RANK" not in os.environ:
        with tempfile.TemporaryDirectory() as folder:
            _write_data(Path(folder), args.resolution)
            launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(args.ranks)]
            sys.exit(subprocess.call([sys.executable, *launcher, *sys.argv, "--folder", folder]))
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    device = distributed.start()
    sides = _measure(args, device)
    if distributed.is_main():
        text = _report(sides, device)
        print(text)
        if args.out:
            args.out.write_text(text, encoding="utf-8")
    distributed.stop()


def _measure(args: argparse.Namespace, device: torch.device) -> list[Side]:
    def config(stage: int) -> TrainConfig:
        return TrainConfig(
            run_dir=str(args.folder / f"zero{stage}"),
            data=DataConfig(path=str(args.folder / "voxels")),
            model=replace(PRESETS["unet3d_small"], patch_size=1 if args.resolution <= 16 else 2),
            deepspeed=DeepSpeedConfig(zero_stage=stage),
            train=LoopConfig(batch_size=args.batch_size),
        )

    sides: list[Side] = [PlainDdp("torch DDP", config(0), device)]
    sides += [Engine(f"ZeRO {stage}", config(stage), device) for stage in range(4)]
    batches = [
        Batches(
            ShapeDataset(side.config.data.path, split="train"),
            side.config,
            first_step=0,
            micro_batch_size=args.batch_size // distributed.world_size(),
            rank=distributed.rank(),
            world_size=distributed.world_size(),
        )
        for side in sides
    ]
    for step in range(NUM_WARMUP_STEPS + args.steps):
        for keeps_average in (True, False):
            for i in range(len(sides)):
                # Another order each time: what a side leaves in the caches helps or hurts another one each time.
                place = (i + step) % len(sides)
                sides[place].timed_step(batches[place], keeps_average=keeps_average)
        if step == NUM_WARMUP_STEPS - 1:
            for side in sides:
                side.forget()
    return sides


def _report(sides: Sequence[Side], device: torch.device) -> str:
    """A table: medians, and medians of the ratios to DDP's step of the same turn."""
    config = sides[0].config
    model = torch.nn.utils.parameters_to_vector(sides[0].parameters).numel()  # type: ignore[attr-defined]
    precision = "bf16 autocast" if config.deepspeed.autocast_dtype(device) else "float32"
    lines = [
        f"{distributed.world_size()} ranks on {platform.processor() or platform.machine()} ({device.type}), torch "
        f"{torch.__version__}, {torch.get_num_threads()} threads a rank, {precision}; UNet3D of {model / 1e6:.1f}M parameters, "
        f"batch {config.train.batch_size}, {len(sides[0].seconds[True])} steps a side.",
        "",
        "| | with an average: s a step | beside DDP | CPU s | beside DDP | without: s a step | beside DDP | CPU s | beside DDP "
        "| waits for data |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for side in sides:
        cells = []
        for keeps_average in (True, False):
            for own, plain in zip(side.times(keeps_average), sides[0].times(keeps_average), strict=True):
                ratio = median(a / b for a, b in zip(own, plain, strict=True))
                cells += [f"{median(own):.4f}", f"{ratio:.3f}"]
        waits = side.seconds_waited / sum(map(sum, side.seconds.values()))
        lines.append(f"| {side.name} | {' | '.join(cells)} | {waits:.2%} |")
    return "\n".join(lines) + "\n"


def _write_data(folder: Path, resolution: int) -> None:
    """Balls, as voxels."""
    axis = np.arange(resolution) - (resolution - 1) / 2
    radius = np.sqrt(axis[:, None, None] ** 2 + axis[:, None] ** 2 + axis**2)
    sizes = np.random.default_rng(0).uniform(0.2, 0.45, 200) * resolution
    np.savez_compressed(folder / "ball.npz", np.stack([radius < size for size in sizes]))
    import_voxels(folder, folder / "voxels")


if __name__ == "__main__":
    main()
