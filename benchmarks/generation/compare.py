"""What equal seconds of training buy: every family of shapediff, and MONAI's DiffusionModelUNet with its own DDIM.

    python benchmarks/generation/compare.py DATA [--entries unet3d latent ...] [--minutes 20] [--threads 2]
                                            [--work runs/generation] [--out FILE.md]

DATA is a folder made by data_tools/prepare.py, or one that holds chair.npz and monitor.npz (ModelNet10 at 32^3, z up), of which
the last tenth of each is held out. Every entry trains for the same wall-clock time on the same threads (two networks, one after
the other, share it), samples as many shapes as are held out and is measured by `python -m shapediff.evaluate`. MONAI is trained
as its tutorials do it (Adam, epsilon, DDPM schedule, no EMA) in float32, and at its best setting: bf16 autocast with channels
last, with the learning rate, warm-up, decay and EMA of our side. Both sides are given the classes; MONAI's inferer has no
guidance, so our diffusion of voxels is measured without it, too. What is in the work folder is not made again.
Needs: pip install --no-deps monai (for its entries).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import safe_open

from shapediff.data.grid_files import open_grid_file
from shapediff.data.importing import upright
from shapediff.data.manifest import MANIFEST_NAME, read_manifest
from shapediff.data.packing import pack_grid
from shapediff.data.shards import ShardWriter
from shapediff.evaluation.report import cell, title

ROOT = Path(__file__).resolve().parents[2]
TURNS = {"chair": 0, "monitor": 1}


@dataclass(frozen=True)
class Entry:
    """What is trained: overrides of each run, in turn, and its share of the minutes. {before} is the run before.

    `steps`: whether it samples step by step. `guidance` lists scales to sample with: None is as exported.
    """

    runs: tuple[tuple[float, tuple[str, ...]], ...]
    steps: bool = False
    guidance: tuple[int | None, ...] = (None,)


DIFFUSION = ("experiment=modelnet10",)
OURS = {
    "unet3d": Entry(((1, DIFFUSION),), steps=True, guidance=(1, None)),
    "dit3d": Entry(
        (
            (
                1,
                (
                    *DIFFUSION,
                    "model=dit3d_s8",
                    "model.hidden_size=256",
                    "model.depth=8",
                    "model.num_heads=4",
                    "model.refine_width=32",
                ),
            ),
        ),
        steps=True,
        guidance=(1, None),
    ),
    "latent": Entry(
        (
            (0.4, ("experiment=shape_vae",)),
            (0.6, ("experiment=latent32", "method.codec={before}")),
        ),
        steps=True,
    ),
    "vae": Entry(((1, ("experiment=shape_vae", "method.kl_weight=0.3")),)),
    "octree": Entry(
        ((1, ("experiment=octree32", "train.batch_size=12", "optimizer.lr=1e-3", "optimizer.warmup_steps=100")),)
    ),
    "wgan": Entry(((1, ("experiment=wgan",)),)),
}
MONAI = {"monai-float32": (), "monai-bf16": ("--fast",)}
METRICS = (
    "1-nna-cd",
    "1-nna-iou",
    "cov-cd",
    "mmd-cd",
    "fid",
    "kid",
    "precision",
    "recall",
    "accuracy",
    "novelty",
    "one-part",
    "bits",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--entries", nargs="+", choices=[*OURS, *MONAI], default=[*OURS, *MONAI])
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps of every diffusion")
    parser.add_argument("--num", type=int, help="shapes of a class (default: as many as are held out)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "generation")
    parser.add_argument("--out", type=Path, help="also write the table here, and a contact sheet beside it")
    args = parser.parse_args()
    args.data, args.work = args.data.resolve(), args.work.resolve()
    is_prepared = (args.data / MANIFEST_NAME).is_file()
    data = args.data if is_prepared else _held_out_last_tenth(args.data, args.work / "data")
    results: list[Result] = []
    for name in args.entries:
        results += _ours(args, data, name, OURS[name]) if name in OURS else [_monai(args, data, name)]
    text = _table(args, results)
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
        _contact_sheet(results, args.out.with_suffix(".png"))


@dataclass(frozen=True)
class Result:
    """One row of the table: its name, the folder of its evaluation, the report, and millions of weights where known."""

    name: str
    folder: Path
    report: dict
    millions: float | None = None
    seconds_each: float | None = None
    samples_seen: int | None = None


def _ours(args: argparse.Namespace, data: Path, name: str, entry: Entry) -> list[Result]:
    before = ""
    for i, (share, overrides) in enumerate(entry.runs, 1):
        run = args.work / (name if i == len(entry.runs) else f"{name}-{i}")
        given = [override.format(before=before) for override in overrides]
        settings = [f"data.resolution={read_manifest(data).resolution}", f"data.path={data}", f"run_dir={run}"]
        command = [*given, *settings, "train.sample_every=0", f"train.max_minutes={share * args.minutes}"]
        _claim(run, [f"OMP_NUM_THREADS={args.threads}", *command])
        if not (run / "export").is_dir():
            _call(args, "launch/train.py", *command)
        before = str(run)
    results = []
    for scale in entry.guidance:
        called = name if scale is None else f"{name}, guidance {scale}"
        out = args.work / called.replace(", ", "-").replace(" ", "-")
        steps = ("--sampler", "ddim", "--steps", str(args.steps)) if entry.steps else ()
        guidance = () if scale is None else ("--guidance", str(scale))
        report = _evaluate(args, data, out, "--checkpoint", str(run), "--draws", "1", *steps, *guidance)
        last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
        facts = (_millions(run / "export"), report["settings"]["seconds_each"], last["samples_seen"])
        results.append(Result(f"shapediff {called}", out, report, *facts))
    return results


def _monai(args: argparse.Namespace, data: Path, name: str) -> Result:
    out = args.work / name
    given = ["--data", str(data), "--to", str(out), "--minutes", str(args.minutes), "--steps", str(args.steps)]
    command = [*given, *_num(args), *MONAI[name]]
    _claim(out, [f"OMP_NUM_THREADS={args.threads}", *command])
    if not (out / "facts.json").is_file():
        _call(args, "benchmarks/generation/monai_side.py", *command)
    facts = json.loads((out / "facts.json").read_text(encoding="utf-8"))
    return Result(name, out, _evaluate(args, data, out, "--samples", str(out / "samples")), **facts)


def _claim(folder: Path, command: list[str]) -> None:
    """Stop where a folder of the work folder was made by another command."""
    path = folder.with_name(f"{folder.name}.command.json")
    if path.is_file() and (found := json.loads(path.read_text(encoding="utf-8"))) != command:
        sys.exit(f"{folder} was made by\n  {' '.join(found)}\nnot\n  {' '.join(command)}\nuse another --work")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(command), encoding="utf-8")


def _millions(export: Path) -> float:
    with safe_open(export / "model.safetensors", "pt") as file:
        return sum(int(np.prod(file.get_slice(key).get_shape())) for key in file.keys()) / 1e6  # noqa: SIM118


def _held_out_last_tenth(grids: Path, out: Path) -> Path:
    if (out / MANIFEST_NAME).is_file():
        return out
    writer = ShardWriter(out, resolution=32, field="occupancy", truncation_voxels=0, classes=sorted(TURNS))
    for name in sorted(TURNS):
        file = open_grid_file(grids / f"{name}.npz")
        read = file.read()
        for i in range(file.num):
            row = pack_grid(upright(read(i), up="z", turns=TURNS[name]), field="occupancy")
            split = "train" if i < 0.9 * file.num else "test"
            writer.add(row, id=f"{name}/{i:04d}", source=f"{name}.npz", class_name=name, split=split)
    writer.finish()
    return out


def _evaluate(args: argparse.Namespace, data: Path, out: Path, *source: str) -> dict:
    _call(args, "-m", "shapediff.evaluate", "--data", str(data), "--out", str(out / "evaluation"), *_num(args), *source)
    return json.loads((out / "evaluation" / "report.json").read_text(encoding="utf-8"))


def _num(args: argparse.Namespace) -> list[str]:
    return [] if args.num is None else ["--num", str(args.num)]


def _call(args: argparse.Namespace, *command: str) -> None:
    print("+", *command, flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def _table(args: argparse.Namespace, results: list[Result]) -> str:
    first = results[0].report
    counts = ", ".join(f"{num} of {name}" for name, num in first["counts"].items())
    lines = [
        f"`python {' '.join(sys.argv)}`",
        "",
        f"{args.minutes:g} minutes of training, {args.threads} threads of {platform.machine()}, DDIM {args.steps}; {counts}; "
        f"seed {first['settings']['seed']}; classifier {first['settings']['classifier']}; intervals of 95 %.",
        "",
        f"| | parameters, M | shapes seen, thousands | sampling, s a shape | {' | '.join(map(title, METRICS))} |",
        "|---|---|---|---|" + "---|" * len(METRICS),
    ]
    for result in results:
        seen = None if result.samples_seen is None else result.samples_seen / 1000
        facts = " | ".join(_number(value) for value in (result.millions, seen, result.seconds_each))
        cells = [_cell(result, metric, "samples") for metric in METRICS]
        lines.append(f"| {result.name} | {facts} | {' | '.join(cells)} |")
    cells = [_cell(results[0], metric, "training") for metric in METRICS]
    lines.append(f"| training shapes in their place | | | | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _cell(result: Result, metric: str, which: str) -> str:
    found = result.report["scores"]["overall"].get(metric, {}).get(which)
    return "" if found is None else cell(metric, found)


def _contact_sheet(results: list[Result], path: Path, *, columns: int = 12) -> None:
    """The first shapes of each entry, a row each, as many of every class."""
    from shapediff.geometry.render import contact_sheet, render_voxels, save_png

    pictures, captions = [], []
    for result in results:
        classes = list(result.report["counts"])[:columns]
        for class_name in classes:
            file = open_grid_file(
                max(result.folder.rglob(f"{class_name}.npz"), key=lambda found: found.stat().st_mtime)
            )
            read = file.read()
            shown = [read(i) for i in range(min(columns // len(classes), file.num))]
            pictures += [render_voxels(np.where(grid, 1.0, -1.0)) for grid in shown]
            captions += [result.name] * len(shown)
    save_png(contact_sheet(pictures, columns=columns, captions=captions), path)


if __name__ == "__main__":
    main()
