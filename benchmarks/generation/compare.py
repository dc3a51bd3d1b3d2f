"""What equal seconds of training buy: shapediff's UNet3D and DiT3D beside MONAI's DiffusionModelUNet with its own DDIM.

    python benchmarks/generation/compare.py GRIDS [--minutes 20] [--threads 2] [--work runs/generation] [--out FILE.md]

GRIDS holds chair.npz and monitor.npz (ModelNet10 at 32^3, z up); the last tenth of each is held out. Every entry trains for the
same wall-clock time on the same threads, samples as many shapes as are held out with DDIM 50 and is measured by
`python -m shapediff.evaluate`. MONAI is trained as its tutorials do it (Adam, epsilon, DDPM schedule, no EMA), once in float32 as
it comes and once at its best setting, bf16 autocast with channels last. Both sides are given the classes; MONAI's inferer has no
guidance, so ours is measured without it, too. What is in the work folder is not made again.
Needs: pip install --no-deps monai.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np

from shapediff.data.grid_files import open_grid_file
from shapediff.data.importing import upright
from shapediff.data.manifest import MANIFEST_NAME
from shapediff.data.packing import pack_grid
from shapediff.data.shards import ShardWriter

ROOT = Path(__file__).resolve().parents[2]
TURNS = {"chair": 0, "monitor": 1}
TRAIN = ("experiment=modelnet10",)
OURS = {
    "unet3d": TRAIN,
    "dit3d": (
        *TRAIN,
        "model=dit3d_s4",
        "model.hidden_size=256",
        "model.depth=8",
        "model.num_heads=4",
        "method.prediction=x0",
        "method.weighting=min_snr",
    ),
}
MONAI = {"monai, float32": (), "monai, bf16": ("--fast",)}
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
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("grids", type=Path)
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=50, help="DDIM steps of every entry")
    parser.add_argument("--num", type=int, help="shapes of a class (default: as many as are held out)")
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "generation")
    parser.add_argument("--out", type=Path, help="also write the table here, and a contact sheet beside it")
    args = parser.parse_args()
    data = _held_out_last_tenth(args.grids, args.work / "data")
    reports: dict[str, dict] = {}
    for name, overrides in OURS.items():
        run = args.work / name
        if not (run / "export").is_dir():
            _call(
                args,
                "launch/train.py",
                *overrides,
                f"data.path={data}",
                f"run_dir={run}",
                f"train.max_minutes={args.minutes}",
            )
        for suffix, guidance in {", no guidance": ("--guidance", "1"), ", as exported": ()}.items():
            out = args.work / f"{name}{suffix}".replace(", ", "-").replace(" ", "-")
            sampling = ("--steps", str(args.steps), *guidance)
            reports[f"shapediff {name}{suffix}"] = _evaluate(args, data, out, "--checkpoint", str(run), *sampling)
    for name, more in MONAI.items():
        out = args.work / name.replace(", ", "-")
        if not (out / "samples").is_dir():
            given = ("--data", str(data), "--to", str(out), "--minutes", str(args.minutes), "--steps", str(args.steps))
            num = () if args.num is None else ("--num", str(args.num))
            _call(args, "benchmarks/generation/monai_side.py", *given, *num, *more)
        reports[name] = _evaluate(args, data, out, "--samples", str(out / "samples"))
    text = _table(args, reports)
    print(text)
    if args.out:
        args.out.write_text(text, encoding="utf-8")
        _contact_sheet(args.work, list(reports), args.out.with_suffix(".png"))


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
    num = () if args.num is None else ("--num", str(args.num))
    _call(args, "-m", "shapediff.evaluate", "--data", str(data), "--out", str(out / "evaluation"), *num, *source)
    return json.loads((out / "evaluation" / "report.json").read_text(encoding="utf-8"))


def _call(args: argparse.Namespace, *command: str) -> None:
    print("+", *command, flush=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads), "PYTHONPATH": str(ROOT), "DS_ACCELERATOR": "cpu"}
    subprocess.run([sys.executable, *command], check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)


def _table(args: argparse.Namespace, reports: dict[str, dict]) -> str:
    first = next(iter(reports.values()))
    cells = {name: report["scores"]["overall"] for name, report in reports.items()}
    counts = ", ".join(f"{num} {name}s" for name, num in first["counts"].items())
    lines = [
        f"`python {' '.join(sys.argv)}`",
        "",
        f"{args.minutes:g} minutes of training, {args.threads} threads of {platform.machine()}, DDIM {args.steps}; {counts}; "
        f"seed {first['settings']['seed']}; classifier {first['settings']['classifier']}; intervals of 95 %.",
        "",
        f"| | {' | '.join(METRICS)} |",
        "|---|" + "---|" * len(METRICS),
    ]
    lines += [
        f"| {name} | {' | '.join(_cell(scores, m, 'samples') for m in METRICS)} |" for name, scores in cells.items()
    ]
    real = next(iter(cells.values()))
    lines.append(f"| training shapes in their place | {' | '.join(_cell(real, m, 'training') for m in METRICS)} |")
    return "\n".join(lines) + "\n"


def _cell(scores: dict, metric: str, which: str) -> str:
    found = scores[metric][which]
    return f"{found['value']:.3g} ± {found['high'] - found['value']:.2g}"


def _contact_sheet(work: Path, names: list[str], path: Path, *, columns: int = 8) -> None:
    """The first shapes of each entry, a row each, half chairs and half monitors."""
    from shapediff.geometry.render import contact_sheet, render_voxels, save_png

    pictures, captions = [], []
    for name in names:
        folder = work / name.removeprefix("shapediff ").replace(", ", "-").replace(" ", "-")
        for class_name in sorted(TURNS):
            (file,) = folder.rglob(f"{class_name}.npz")
            read = open_grid_file(file).read()
            pictures += [render_voxels(np.where(read(i), 1.0, -1.0)) for i in range(columns // 2)]
            captions += [name] * (columns // 2)
    save_png(contact_sheet(pictures, columns=columns, captions=captions), path)


if __name__ == "__main__":
    main()
