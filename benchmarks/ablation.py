"""Denoisers and their settings compared at equal training seconds, on shapes that none of them saw.

    python data_tools/import_voxels.py GRIDS data/modelnet10 --up z --turn monitor=1
    python benchmarks/ablation.py data/modelnet10 --minutes 5 --out FILE.md [--only 0 3 ...]

Each variant is a run of `launch/train.py experiment=modelnet10` with overrides, under runs/ablation/; one that is there is not
trained again. Of every export, EMA weights: the error of x_0_hat against held-out shapes (val and test) at six noise levels, in
units of the error of the best constant; the variational bound in bits per voxel over 25 of the timesteps; and of 2 x 8 samples
(DDIM 50, guidance 2) the IoU with the nearest training shape, beside that of the held-out shapes themselves.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from shapediff.checkpoint import find_export, read_export
from shapediff.data.dataset import ShapeDataset
from shapediff.diffusion.bound import variational_bound
from shapediff.diffusion.gaussian import q_sample
from shapediff.diffusion.random import NoiseSource
from shapediff.diffusion.samplers import Process, timestep_array
from shapediff.pipeline import ShapePipeline

ROOT = Path(__file__).resolve().parents[1]
NUM_BOUND_STEPS = 25
NOISE_LEVELS = (0.3, 0.6, 0.8, 0.9, 0.97, 0.99)
DIT = (
    "model=dit3d_s8",
    "model.hidden_size=256",
    "model.depth=8",
    "model.num_heads=4",
    "train.batch_size=32",
    "optimizer.lr=5e-4",
)
X0 = "method.prediction=x0"
SMALL_BATCHES = (X0, "method.weighting=min_snr", "train.batch_size=12", "optimizer.lr=1e-3")
VARIANTS: dict[str, tuple[str, ...]] = {
    "unet3d_small, v": (),
    "dit, patch 8, epsilon": (*DIT, "method.prediction=epsilon"),
    "dit, patch 8, v": DIT,
    "dit, patch 8, x0": (*DIT, X0),
    "dit, patch 8, x0, min_snr": (*DIT, X0, "method.weighting=min_snr"),
    "dit, patch 8, x0, snr_plus_one": (*DIT, X0, "method.weighting=snr_plus_one"),
    "dit, patch 8, x0, bottleneck 64": (*DIT, X0, "model.bottleneck=64"),
    "dit, patch 8, x0, rope": (*DIT, X0, "model.positions=rope"),
    "dit, patch 4, x0, min_snr, batch 12": (*DIT, "model.patch_size=4", *SMALL_BATCHES),
    "dit, patch 8, x0, min_snr, batch 12": (*DIT, *SMALL_BATCHES),
    "dit, patch 8, v, batch 12, refine 32": (*DIT, "model.refine_width=32", "train.batch_size=12", "optimizer.lr=1e-3"),
}


@dataclass(frozen=True)
class Score:
    """What the table says of one export; `errors` one a noise level."""

    num_parameters: int
    samples_seen: int
    errors: tuple[float, ...]
    bits_per_voxel: float
    nearest_iou: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--minutes", type=float, default=5)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "ablation")
    parser.add_argument("--only", type=int, nargs="+", default=range(len(VARIANTS)), help="numbers of variants, from 0")
    parser.add_argument("--out", type=Path, help="also write what is printed here")
    args = parser.parse_args()
    lines = _head(args)
    print("\n".join(lines))
    for name in (list(VARIANTS)[i] for i in args.only):
        run = args.runs / name.replace(", ", "-").replace(" ", "")
        if not (run / "export").is_dir():
            _train(run, args.data, args.minutes, VARIANTS[name])
        lines.append(_row(name, score(run, args.data)))
        print(lines[-1], flush=True)
    if args.out:
        args.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _head(args: argparse.Namespace) -> list[str]:
    levels = " | ".join(f"{level:g}" for level in NOISE_LEVELS)
    return [
        f"`python {' '.join(sys.argv)}`",
        "",
        f"{args.minutes:g} minutes of training each, {torch.get_num_threads()} threads, torch {torch.__version__}. "
        f"Nearest training shape of the held-out shapes themselves: IoU {_iou_of_held_out(args.data):.2f} (median).",
        "",
        f"| | parameters | samples seen | x_0 error at sqrt(1 - abar) = {levels} | bits a voxel | IoU with the nearest |",
        "|---|---|---|" + "---|" * len(NOISE_LEVELS) + "---|---|",
    ]


def _row(name: str, found: Score) -> str:
    errors = " | ".join(f"{error:.3f}" for error in found.errors)
    return (
        f"| {name} | {found.num_parameters / 1e6:.1f}M | {found.samples_seen:,} | {errors} | {found.bits_per_voxel:.4f} | "
        f"{found.nearest_iou:.2f} |"
    )


def _train(run: Path, data: Path, minutes: float, overrides: tuple[str, ...]) -> None:
    command = [
        sys.executable,
        str(ROOT / "launch" / "train.py"),
        "experiment=modelnet10",
        f"data.path={data}",
        f"run_dir={run}",
    ]
    run.mkdir(parents=True, exist_ok=True)
    with (run / "ablation.log").open("w") as log:
        subprocess.run([*command, f"train.max_minutes={minutes}", *overrides], check=True, stdout=log, stderr=log)


def score(run: Path, data: Path) -> Score:
    """Judge the export of a run."""
    export = read_export(find_export(run))
    pipeline, method, net = ShapePipeline(export), export.method, export.networks["denoiser"].eval()
    batch = _held_out(data)
    x_0, label = batch["voxels"], batch["label"]
    process = Process(method.schedule, method.config.prediction)

    def denoise(x_t: Tensor, t: Tensor) -> Tensor:
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
            parts = zip(x_t.split(16), t.split(16), label.split(16), strict=True)
            return torch.cat([net(*part).float() for part in parts])[:, : x_t.shape[1]]

    errors = []
    constant = (x_0 - x_0.mean(0)).square().mean()
    for i, level in enumerate(NOISE_LEVELS):
        t = int(torch.argmin((method.schedule.noise_level(torch.arange(method.schedule.num_timesteps)) - level).abs()))
        eps = NoiseSource([1000 * i + n for n in range(len(x_0))], x_0.device).normal(x_0.shape[1])
        x_t = q_sample(x_0, eps, torch.full((len(x_0),), t), schedule=method.schedule)
        errors.append(float((process.evaluate(denoise, x_t, t).x_0 - x_0).square().mean() / constant))
    bound = variational_bound(
        denoise,
        x_0,
        timestep_array(method.schedule.num_timesteps, NUM_BOUND_STEPS),
        process=process,
        noise=NoiseSource(list(range(len(x_0))), x_0.device),
    )
    samples = [pipeline(8, label=name, guidance_scale=2.0, num_steps=50, seed=0).voxels for name in pipeline.classes]
    train = ShapeDataset(data, split="train")
    dense = torch.cat([torch.as_tensor(voxels).reshape(8, -1) for voxels in samples]) > 0
    return Score(
        num_parameters=sum(p.numel() for p in net.parameters()),
        samples_seen=json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["samples_seen"],
        errors=tuple(errors),
        bits_per_voxel=float(bound.total.mean()),
        nearest_iou=float(np.median(_nearest_iou(dense, _dense(train)))),
    )


def _held_out(data: Path) -> dict[str, Tensor]:
    parts = [ShapeDataset(data, split=split) for split in ("val", "test")]
    batches = [part.batch(np.arange(len(part))) for part in parts]
    return {key: torch.cat([batch[key] for batch in batches]) for key in ("voxels", "label")}


def _dense(dataset: ShapeDataset) -> Tensor:
    from shapediff.grid.morton import morton_to_dense

    return (morton_to_dense(dataset.batch(np.arange(len(dataset)))["voxels"]) > 0).reshape(len(dataset), -1)


def _iou_of_held_out(data: Path) -> float:
    from shapediff.grid.morton import morton_to_dense

    held_out = (morton_to_dense(_held_out(data)["voxels"]) > 0).flatten(1)
    return float(np.median(_nearest_iou(held_out, _dense(ShapeDataset(data, split="train")))))


def _nearest_iou(shapes: Tensor, others: Tensor) -> np.ndarray:
    """For each row of `shapes` the largest IoU with a row of `others`; both (n, voxels) bool."""
    one, other = shapes.float(), others.float()
    shared = one @ other.T
    union = one.sum(1)[:, None] + other.sum(1)[None] - shared
    return (shared / union.clamp(min=1)).max(1).values.numpy()


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")
