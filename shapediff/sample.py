"""Generate meshes: `python -m shapediff.sample --class chair --guidance 3`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from torch import Tensor

from shapediff.checkpoint import CONFIG_FILE, EXPORT_FOLDER
from shapediff.config_io import unknown_name
from shapediff.diffusion.samplers import SAMPLERS
from shapediff.diffusion.samplers.common import SPACINGS
from shapediff.editing import box_mask, parse_label, read_voxels
from shapediff.errors import CheckpointError, ConfigError, MeshError, ShapediffError
from shapediff.pipeline import AXES, MANIFEST_FILE, MESH_FORMATS, NUM_RESAMPLES, Label, ShapePipeline, Shapes

RUNS_FOLDER = Path("runs")
PREVIEW_FILE, PREVIEW_SIZE = "preview.png", 256
INTERRUPTED = 130


def parser() -> argparse.ArgumentParser:
    """The command line of sampling."""
    p = argparse.ArgumentParser(prog="python -m shapediff.sample", description=__doc__)
    p.add_argument(
        "--class", dest="classes", nargs="+", metavar="CLASS", help="class names, or 'all'; without it, no class"
    )
    p.add_argument("--checkpoint", type=Path, help="a run or an export (default: the newest under runs/)")
    p.add_argument("--num", type=int, default=4, help="shapes of each class (default 4)")
    p.add_argument("--guidance", type=float, help="guidance scale; 1 is none (default: as exported, mostly 3)")
    p.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        help="guide at these noise levels only, 0 (clean) to 1 (pure noise); default 0 1",
    )
    p.add_argument("--guidance-rescale", type=float, help="take back this share, 0 to 1, of the contrast it adds")
    p.add_argument("--split-batch", action="store_true", default=None, help="guide in half the memory, a little slower")
    p.add_argument("--steps", type=int, help="sampling steps (default: as exported, mostly 50)")
    p.add_argument("--sampler", choices=SAMPLERS, help="default: as exported, mostly ddim")
    p.add_argument("--eta", type=float, help="fresh noise in each DDIM step, 0 to 1 (default 0)")
    p.add_argument(
        "--spacing", choices=SPACINGS, help="which timesteps the steps visit (default: as exported, mostly trailing)"
    )
    p.add_argument("--seed", type=int, default=0, help="the same seed gives the same shapes (default 0)")
    p.add_argument("--out", type=Path, default=Path("samples"), help="folder to write to (default samples/)")
    p.add_argument("--format", choices=MESH_FORMATS, default="obj", help="mesh format (default obj)")
    p.add_argument("--preview", action="store_true", help="also draw preview.png, a contact sheet of all shapes")
    p.add_argument(
        "--batch-size", type=int, default=8, help="shapes computed together (default 8); less takes less memory"
    )
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    p.add_argument("--precision", choices=("float32", "bf16"), help="default: bf16 where the machine is faster at it")
    _add_edits(p)
    return p


def _add_edits(p: argparse.ArgumentParser) -> None:
    g = p.add_argument_group("edits", "of shapes in FILE, a mesh or a grid (.npz .npy .binvox); see docs/editing.md")
    edit = g.add_mutually_exclusive_group()
    edit.add_argument(
        "--complete", metavar="FILE", help="keep a part of this shape, or all of it, and generate the rest"
    )
    edit.add_argument("--vary", metavar="FILE", help="make variations on this shape")
    edit.add_argument(
        "--interpolate", nargs=2, metavar=("A", "B"), help="--num shapes on the way between two seeds, classes or FILEs"
    )
    g.add_argument(
        "--keep-box", type=float, nargs=6, metavar=("X0", "Y0", "Z0", "X1", "Y1", "Z1"),
        help="--complete keeps this box of the cube from -0.5 to 0.5, y up (default: all that is solid)",
    )  # fmt: skip
    g.add_argument(
        "--resamples",
        type=int,
        default=NUM_RESAMPLES,
        help=f"how often --complete reworks the fit (default {NUM_RESAMPLES})",
    )
    g.add_argument(
        "--strength", type=float, default=0.5, help="of --vary: 0 is the shape itself, 1 a new one (default 0.5)"
    )
    g.add_argument("--mirror", choices=AXES, help="make every shape symmetric; x is left and right")
    g.add_argument("--input-up", choices=("y", "z"), default="y", help="the vertical axis of FILE (default y)")
    g.add_argument("--as-placed", action="store_true", help="do not fit FILE into the cube: it is placed there already")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = parser().parse_args(arguments)
    try:
        return run(args)
    except ShapediffError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"\nstopped; the shapes that were done are in {args.out}", file=sys.stderr)
        return INTERRUPTED


def run(args: argparse.Namespace) -> int:
    """Sample what the arguments ask for, writing each batch as soon as it is done."""
    pipeline = ShapePipeline.from_pretrained(args.checkpoint or newest_export(RUNS_FOLDER)).to(args.device)
    sampling = {
        "guidance_scale": args.guidance,
        "guidance_interval": args.guidance_interval and tuple(args.guidance_interval),
        "guidance_rescale": args.guidance_rescale,
        "split_batch": args.split_batch,
        "num_steps": args.steps,
        "sampler": args.sampler,
        "eta": args.eta,
        "spacing": args.spacing,
    }
    options = {
        "seed": args.seed,
        "batch_size": args.batch_size,
        "precision": args.precision,
        **{name: value for name, value in sampling.items() if value is not None},
    }
    drawn: list[np.ndarray] = []
    num_written = num_empty = 0
    with _progress_bar() as bar:
        for label in _labels(args.classes, pipeline.classes):
            task = bar.add_task(label if isinstance(label, str) else "shapes", total=None)
            on_step = partial(_show_step, bar, task)
            for shapes in _sampled(pipeline, args, label, {**options, "on_step": on_step}):
                paths = shapes.save(args.out, format=args.format)
                num_empty += paths.count(None)
                num_written += len(paths) - paths.count(None)
                if args.preview:
                    drawn += _render(shapes)
    if args.preview:
        _save_preview(drawn, args.out / PREVIEW_FILE, columns=min(args.num, 8))
        print(f"picture: {args.out / PREVIEW_FILE}")
    empty = f", {num_empty} empty ones left out" if num_empty else ""
    print(f"{num_written} meshes in {args.out} ({args.format}){empty}; listed in {args.out / MANIFEST_FILE}")
    return 0 if num_written else 1


def newest_export(runs: Path) -> Path:
    """The run under `runs` whose export is newest. Raises CheckpointError where no run has one."""
    configs = list(runs.glob(f"*/{EXPORT_FOLDER}/{CONFIG_FILE}"))
    if not configs:
        raise CheckpointError(
            f"there is no trained model under {runs}/; train one (`make quickstart` or `deepspeed launch/train.py`), "
            "or say where it is: --checkpoint RUN_OR_EXPORT"
        )
    return max(configs, key=lambda path: path.stat().st_mtime).parent


def _labels(asked: Sequence[str] | None, known: Sequence[str]) -> list[Label]:
    if not asked:
        return [None]
    labels: list[Label] = [parse_label(text, known) for text in dict.fromkeys(asked)]
    for label in labels:
        if isinstance(label, str) and label not in known and label != "all":
            raise ConfigError(unknown_name("class", label, known))
    return list(known) if "all" in labels else labels


def _sampled(
    pipeline: ShapePipeline, args: argparse.Namespace, label: Label, options: dict[str, Any]
) -> Iterable[Shapes]:
    """The shapes of one label, edited where the arguments say so: an edit comes as one batch."""
    options = {**options, "label": label, "mirror": args.mirror}

    def read(path: str) -> Tensor:
        return read_voxels(path, pipeline.config, up=args.input_up, is_placed=args.as_placed)

    if args.complete:
        voxels, box = read(args.complete), args.keep_box
        keep = voxels > 0 if box is None else box_mask(box, pipeline.config.resolution)
        return [pipeline.complete(voxels, keep, args.num, num_resamples=args.resamples, **options)]
    if args.vary:
        return [pipeline.vary(read(args.vary), args.strength, args.num, **options)]
    if args.interpolate:
        a, b = (_end(text, pipeline.classes, read) for text in args.interpolate)
        return [pipeline.interpolate(a, b, args.num, **options)]
    return pipeline.stream(args.num, **options)


def _end(text: str, classes: Sequence[str], read: Callable[[str], Tensor]) -> int | Label | Tensor:
    """One end of an interpolation: a seed, a class or mixture, or else a file."""
    if text.isdigit():
        return int(text)
    if text in classes:
        return text
    return (
        read(text) if Path(text.rpartition(":")[0] or text).exists() or ":" not in text else parse_label(text, classes)
    )


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn()
    )


def _show_step(bar: Progress, task: TaskID, done: int, steps: int) -> None:
    bar.update(task, completed=done, total=steps)


def _render(shapes: Shapes) -> list[np.ndarray]:
    """One picture a shape; an empty shape is a blank one, so that rows stay rows."""
    from shapediff.geometry.render import render_mesh

    pictures = []
    for i in range(len(shapes)):
        try:
            pictures.append(render_mesh(shapes.mesh(i), size=PREVIEW_SIZE))
        except MeshError:
            pictures.append(np.full((PREVIEW_SIZE, PREVIEW_SIZE, 3), 255, np.uint8))
    return pictures


def _save_preview(pictures: list[np.ndarray], path: Path, *, columns: int) -> None:
    from shapediff.geometry.render import contact_sheet, save_png

    save_png(contact_sheet(pictures, columns=columns), path)


if __name__ == "__main__":
    sys.exit(main())
