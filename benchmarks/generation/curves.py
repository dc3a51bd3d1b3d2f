"""Quality against guidance scale, number of steps and sampler: what the defaults of a model should be.

    python benchmarks/generation/curves.py CHECKPOINT DATA [--num 8] [--curves guidance steps] [--work runs/curves] [--out STEM]

Every point is `python -m shapediff.evaluate` of `--num` shapes of each class against the held-out shapes of DATA. Writes
STEM.png, a panel a metric with intervals of 95 % and, in grey, what training shapes get in the same place, and STEM.md, the same
as a table. What is in the work folder is not made again. Needs matplotlib.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from compare import ROOT
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from shapediff.evaluation.report import cell, in_unit, title

METRICS = ("1-nna-cd", "fid", "precision", "recall", "one-part")
RESCALES = {0.0: (1.0, 1.5, 2.0, 3.0, 4.0, 6.0), 0.7: (1.5, 3.0, 6.0)}
STEPS = {"ddim": (5, 10, 20, 50), "dpm_solver": (5, 10, 20, 50), "heun": (5, 10, 20), "ddpm": (5, 10, 20, 50)}


@dataclass(frozen=True)
class Line:
    """One line of a panel: x and the options of evaluate at each."""

    name: str
    points: tuple[tuple[float, tuple[str, ...]], ...]


CURVES = {
    "guidance": (
        "guidance scale, sampler and steps as exported",
        tuple(
            Line(
                f"rescale {rescale:g}",
                tuple((scale, ("--guidance", str(scale), "--guidance-rescale", str(rescale))) for scale in scales),
            )
            for rescale, scales in RESCALES.items()
        ),
    ),
    "steps": (
        "steps, guidance as exported (heun sees two a step)",
        tuple(
            Line(sampler, tuple((num, ("--sampler", sampler, "--steps", str(num))) for num in steps))
            for sampler, steps in STEPS.items()
        ),
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("data", type=Path)
    parser.add_argument("--num", type=int, default=8, help="shapes of a class")
    parser.add_argument("--curves", nargs="+", choices=CURVES, default=list(CURVES))
    parser.add_argument("--work", type=Path, default=ROOT / "runs" / "curves")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "curves" / "curves")
    args = parser.parse_args()
    scores = {
        options: _evaluate(args, options)
        for name in args.curves
        for line in CURVES[name][1]
        for _, options in line.points
    }
    args.out.with_suffix(".md").write_text(_table(args, scores), encoding="utf-8")
    _plot(args, scores)
    print(_table(args, scores))


def _evaluate(args: argparse.Namespace, options: tuple[str, ...]) -> dict:
    out = args.work / "".join(options).replace("--", "-").strip("-")
    if not (out / "report.json").is_file():
        given = ("--checkpoint", args.checkpoint, "--data", str(args.data), "--num", str(args.num), "--out", str(out))
        command = [sys.executable, "-m", "shapediff.evaluate", *given, "--distances", "cd", "--draws", "1", *options]
        print("+", *command[1:], flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    asked = {"samples": args.checkpoint, "data": str(args.data), "num": args.num}
    if found := {name: report["settings"][name] for name in asked if report["settings"][name] != asked[name]}:
        sys.exit(f"{out} is of {found}; use another --work")
    return report["scores"]["overall"]


def _table(args: argparse.Namespace, scores: dict[tuple[str, ...], dict]) -> str:
    lines = [
        f"`python {' '.join(sys.argv)}`: {args.num} shapes a class, intervals of 95 %.",
        "",
        f"| | {' | '.join(map(title, METRICS))} |",
        "|---|" + "---|" * len(METRICS),
    ]
    rows = {" ".join(options).replace("--", ""): (found, "samples") for options, found in scores.items()}
    rows["training shapes in their place"] = next(iter(scores.values())), "training"
    for name, (found, which) in rows.items():
        cells = [cell(metric, found[metric][which]) for metric in METRICS]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _plot(args: argparse.Namespace, scores: dict[tuple[str, ...], dict]) -> None:
    figure = Figure(figsize=(3 * len(METRICS), 2.8 * len(args.curves)), layout="constrained")
    for row, name in zip(figure.subplots(len(args.curves), len(METRICS), squeeze=False), args.curves, strict=True):
        varied, drawn = CURVES[name]
        for panel, metric in zip(row, METRICS, strict=True):
            for line in drawn:
                x = [value for value, _ in line.points]
                found = [scores[options][metric]["samples"] for _, options in line.points]
                panel.plot(x, [in_unit(metric, e["value"]) for e in found], "o-", label=line.name, markersize=3)
                panel.fill_between(
                    x, *([in_unit(metric, e[end]) for e in found] for end in ("low", "high")), alpha=0.12
                )
            real = {
                key: in_unit(metric, value) for key, value in next(iter(scores.values()))[metric]["training"].items()
            }
            panel.axhspan(real["low"], real["high"], color="0.9", zorder=0)
            panel.axhline(real["value"], color="0.6", zorder=0)
            panel.set_title(title(metric), fontsize=9)
            panel.set_xscale("log")
            x = [value for value, _ in drawn[0].points]
            panel.set_xticks(x, [f"{value:g}" for value in x])
            panel.minorticks_off()
        row[0].set_xlabel(varied, loc="left")
        if len(drawn) > 1:
            row[0].legend(fontsize=7)
    FigureCanvasAgg(figure)
    figure.savefig(args.out.with_suffix(".png"), dpi=110)


if __name__ == "__main__":
    main()
