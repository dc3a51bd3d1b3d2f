"""Generate meshes: `python -m shapediff.sample --class chair --guidance 3`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from shapediff.checkpoint import CONFIG_FILE, EXPORT_FOLDER
from shapediff.config_io import unknown_name
from shapediff.diffusion.samplers import SAMPLERS
from shapediff.diffusion.samplers.common import SPACINGS
from shapediff.errors import CheckpointError, ConfigError, MeshError, ShapediffError
from shapediff.geometry.gallery import Gallery
from shapediff.pipeline import MANIFEST_FILE, MESH_FORMATS, ShapePipeline, Shapes

RUNS_FOLDER = Path("runs")
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
    p.add_argument(
        "--batch-size", type=int, default=8, help="shapes computed together (default 8); less takes less memory"
    )
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    p.add_argument("--precision", choices=("float32", "bf16"), help="default: bf16 where the machine is faster at it")
    _add_pictures(p)
    return p


def _add_pictures(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("pictures", "drawn without a display or a GPU, beside the meshes")
    group.add_argument(
        "--preview", action="store_true", help="preview.png: a sheet of all shapes, a row for each class"
    )
    group.add_argument("--turntable", action="store_true", help="turntable.gif: the shapes turning, 32 at most")
    group.add_argument(
        "--html", action="store_true", help="shapes.html: one file with every shape to turn and download"
    )


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
    gallery = Gallery(sheet=args.preview, turntable=args.turntable, page=args.html, columns=min(args.num, 8))
    num_written = num_empty = 0
    with _progress_bar() as bar:
        for label in _labels(args.classes, pipeline.classes):
            task = bar.add_task(label or "shapes", total=None)
            on_step = partial(_show_step, bar, task)
            for shapes in pipeline.stream(args.num, label=label, on_step=on_step, **options):
                paths = shapes.save(args.out, format=args.format)
                num_empty += paths.count(None)
                num_written += len(paths) - paths.count(None)
                if gallery:
                    _hang(shapes, gallery)
    for path in gallery.save(args.out):
        print(f"picture: {path}")
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


def _labels(asked: Sequence[str] | None, known: Sequence[str]) -> list[str | None]:
    if not asked:
        return [None]
    for name in asked:
        if name not in known and name != "all":
            raise ConfigError(unknown_name("class", name, known))
    return list(known) if "all" in asked else list(dict.fromkeys(asked))


def _progress_bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"), TimeRemainingColumn()
    )


def _show_step(bar: Progress, task: TaskID, done: int, steps: int) -> None:
    bar.update(task, completed=done, total=steps)


def _hang(shapes: Shapes, gallery: Gallery) -> None:
    """Give every shape to the gallery, an empty one as a blank."""
    for i, (name, label) in enumerate(zip(shapes.names, shapes.classes, strict=True)):
        try:
            gallery.add(shapes.mesh(i), name, label or "shapes")
        except MeshError:
            gallery.add(None, name, label or "shapes")


if __name__ == "__main__":
    sys.exit(main())
