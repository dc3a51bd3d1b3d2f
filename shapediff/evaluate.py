"""Measure generated shapes: `python -m shapediff.evaluate --checkpoint RUN --data DATASET`, or `--samples FOLDER` of anyone's."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress

from shapediff.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from shapediff.config_io import unknown_name
from shapediff.data.dataset import ShapeDataset
from shapediff.data.manifest import Split
from shapediff.data.shape_folder import read_shapes
from shapediff.diffusion.samplers import SAMPLERS
from shapediff.errors import ConfigError, DataError, ShapediffError
from shapediff.evaluation.cache import MatrixCache
from shapediff.evaluation.classifier import fingerprint, trained_classifier
from shapediff.evaluation.distances import DISTANCES
from shapediff.evaluation.evaluator import MIN_SHAPES, Evaluator, with_enough
from shapediff.evaluation.points import NUM_POINTS, Grids
from shapediff.evaluation.report import report_path, table, to_json
from shapediff.evaluation.shapes import ShapeSet, join
from shapediff.files import replaced_file, write_json, write_text
from shapediff.gallery import file_facts
from shapediff.grid.morton import morton_to_dense
from shapediff.hardware import keep_freed_memory
from shapediff.held_out import held_out_scores
from shapediff.hub import locate
from shapediff.pipeline import ShapePipeline

HELD_OUT: tuple[Split, ...] = ("val", "test")
CACHE_FOLDER, SAMPLES_FOLDER = "evaluation", "samples"
INTERRUPTED = 130
BATCH_SIZE = 8
SAMPLING = (
    *("guidance_scale", "guidance_rescale", "guidance_interval", "num_steps", "sampler"),
    *("temperature", "top_k", "top_p", "draws"),
)
"""Arguments that are settings of sampling."""

logger = logging.getLogger(__name__)


def parser() -> argparse.ArgumentParser:
    """The command line of evaluation."""
    p = argparse.ArgumentParser(prog="python -m shapediff.evaluate", description=__doc__)
    source = p.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--checkpoint",
        help="a run, an export or a model that comes with shapediff, to sample from; as --checkpoint of sample",
    )
    source.add_argument("--samples", type=Path, help="a folder of meshes or grids, of whatever made them")
    p.add_argument("--data", type=Path, required=True, help="the data set; its val and test splits are held out")
    p.add_argument("--class", dest="classes", nargs="+", metavar="CLASS", help="these classes alone (default: all)")
    p.add_argument("--num", type=int, help="shapes of each class (default: as many as are held out)")
    p.add_argument(
        "--distances", nargs="+", choices=DISTANCES, default=["cd", "swd", "iou"], help="default: cd swd iou"
    )
    p.add_argument("--points", type=int, default=NUM_POINTS, help=f"points a shape (default {NUM_POINTS})")
    p.add_argument("--seed", type=int, default=0, help="of the samples and of what is drawn (default 0)")
    p.add_argument(
        "--out",
        type=Path,
        help="folder of report.json, report.md (default: evaluation/ in the run, or the samples'; "
        "a report of other settings that is there is kept, beside report-2.json)",
    )
    p.add_argument(
        "--cache", type=Path, help="folder of the classifier and of distances (default: evaluation/ in the data set)"
    )
    p.add_argument("--plot", action="store_true", help="also draw report.png (needs matplotlib)")
    group = p.add_argument_group("sampling from --checkpoint (default: as exported)")
    group.add_argument("--guidance", dest="guidance_scale", type=float, metavar="SCALE", help="guidance scale")
    group.add_argument("--guidance-rescale", type=float, help="0 to 1")
    group.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels, 0 to 1")
    group.add_argument("--steps", dest="num_steps", type=int, metavar="N", help="sampling steps")
    group.add_argument("--sampler", choices=SAMPLERS)
    group.add_argument("--temperature", type=float, help="of the choice of tokens, for autoregressive models")
    group.add_argument("--top-k", type=int, metavar="K", help="choose among the K likeliest tokens alone")
    group.add_argument("--top-p", type=float, metavar="P", help="among the likeliest that reach P together")
    group.add_argument("--draws", type=int, metavar="N", help="draw shapes in several parts again, up to N times")
    group.add_argument("--batch-size", type=int, help="shapes sampled together (default 8)")
    group.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    return p


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
        print("\nstopped; the same command goes on from the samples and distances that are done", file=sys.stderr)
        return INTERRUPTED


def run(args: argparse.Namespace) -> int:
    """Sample or read, measure, write the report, print the table."""
    started = time.perf_counter()
    for name, value in (("--points", args.points), ("--num", args.num)):
        if value is not None and value < MIN_SHAPES:
            raise ConfigError(f"{name} {value} must be at least {MIN_SHAPES}")
    options = _sampling_options(args)
    out = args.out or _default_out(args.samples or args.checkpoint)
    cache = args.cache or args.data / CACHE_FOLDER
    console = Console(stderr=True)
    dataset = ShapeDataset(args.data)
    classes, resolution = dataset.classes, dataset.resolution
    chosen = _chosen_classes(args.classes, classes)
    pipeline, source = _fitting_pipeline(args, chosen, resolution, options) if args.checkpoint else (None, {})
    with console.status("reading the data set") as status:
        real = join([read_split(args.data, split) for split in HELD_OUT])
        train = read_split(args.data, "train")
        status.update("training the classifier, once for this data set (a minute or two)")
        judge_path = cache / f"classifier-{fingerprint(train.grids, train.labels)}.safetensors"
        judge = trained_classifier(train.grids, train.labels, len(classes), path=judge_path)
        settings = {
            "samples": str(args.samples or args.checkpoint),
            "sampling": source,
            "data": str(args.data),
            "held_out": list(HELD_OUT),
            "classes": chosen,
            "num": args.num,
            "distances": {name: DISTANCES[name].title for name in args.distances},
            "points": args.points,
            "seed": args.seed,
            "classifier": hashlib.sha256(judge_path.read_bytes()).hexdigest()[:16],
        }
        path = report_path(out, settings, beside=args.out is None)
    if pipeline is None:
        generated = read_samples(args.samples, classes=chosen, known=classes, resolution=resolution, num=args.num)
        seconds_each = None
    else:
        kinds = {"held out": real, "to train on": train}
        there = {name: {kind: len(s.of_class(classes.index(name))) for kind, s in kinds.items()} for name in chosen}
        counts = {name: args.num or there[name]["held out"] for name in with_enough(there)}
        folder = out / SAMPLES_FOLDER / hashlib.sha256(json.dumps(source).encode()).hexdigest()[:16]
        more = {"seed": args.seed, "batch_size": args.batch_size or BATCH_SIZE, **options}
        generated, seconds_each = sample(pipeline, counts, classes, folder, console, **more)
    with console.status("measuring") as status:
        evaluation = Evaluator(
            real,
            train,
            classes,
            judge,
            distances=args.distances,
            num_points=args.points,
            seed=args.seed,
            cache=MatrixCache(cache / "distances"),
            on_progress=lambda text: status.update(text),
        ).evaluate(generated)
    if pipeline is not None:
        found = held_out_scores(pipeline, args.data, splits=HELD_OUT, classes=list(evaluation.counts), seed=args.seed)
        for metric, estimates in found.items():
            for name, value in estimates.items():
                evaluation.generated[name][metric] = value
    seconds = round(time.perf_counter() - started, 1)
    write_json(path, to_json(evaluation, settings | {"seconds": seconds, "seconds_each": seconds_each}))
    write_text(path.with_suffix(".md"), table(evaluation))
    if args.plot:
        from shapediff.evaluation.plots import plot

        plot(evaluation, path.with_suffix(".png"))
    print(table(evaluation))
    print(f"{path}, {path.with_suffix('.md')}: {seconds:.0f} seconds")
    return 0


def _default_out(source: Path | str) -> Path:
    """In the folder of what is measured; of a model that has none here, in a folder that does not take its name."""
    return Path(source) / CACHE_FOLDER if Path(source).exists() else Path(CACHE_FOLDER) / str(source).replace("/", "-")


def read_split(data: Path, split: Split) -> ShapeSet:
    """The shapes of one split, inside where the signal is above 0."""
    dataset = ShapeDataset(data, split=split)
    side = (dataset.resolution,) * 3
    parts = [
        morton_to_dense(dataset.batch(rows)["voxels"] > 0).numpy()
        for rows in np.array_split(np.arange(len(dataset)), max(1, len(dataset) // 256))
        if len(rows)
    ]
    return ShapeSet(np.concatenate(parts) if parts else np.zeros((0, *side), bool), dataset.labels)


def read_samples(
    folder: Path, *, classes: Sequence[str], known: Sequence[str], resolution: int, num: int | None
) -> ShapeSet:
    """The first `num` shapes of each of `classes` in a folder; their labels are places in `known`."""
    skipped: list[tuple[Path, str]] = []
    found = list(
        read_shapes(folder, classes=classes, resolution=resolution, num=num, on_skip=lambda *line: skipped.append(line))
    )
    if skipped:
        logger.warning("%d files are left out, such as %s: %s", len(skipped), *skipped[0])
    if not found:
        raise DataError(f"{folder} holds no shape of the classes {', '.join(classes)} that could be read")
    closed = [shape.is_closed for shape in found]
    return ShapeSet(
        np.stack([shape.grid for shape in found]),
        np.array([known.index(shape.class_name) for shape in found]),
        None if None in closed else np.array(closed, dtype=bool),
    )


def sample(
    pipeline: ShapePipeline,
    counts: dict[str, int],
    classes: Sequence[str],
    folder: Path,
    console: Console,
    **options: Any,
) -> tuple[ShapeSet, float]:
    """Sample from the export, class by class: the shapes, and the seconds that each took.

    A class whose samples are in `folder`, of these settings, is not sampled again.
    """
    sets: list[ShapeSet] = []
    total = 0.0
    with Progress(console=console) as bar:
        task = bar.add_task("sampling", total=sum(counts.values()))
        for name, num in counts.items():
            kept = _kept_samples(folder / f"{name}.npz", num)
            if kept is None:
                parts, started = [], time.perf_counter()
                for shapes in pipeline.stream(num, label=name, **options):
                    parts.append(shapes.voxels.numpy() > 0)
                    bar.advance(task, len(shapes))
                kept = np.concatenate(parts), (time.perf_counter() - started) / num
                _keep_samples(folder / f"{name}.npz", *kept)
            else:
                bar.advance(task, num)
            grids, seconds_each = kept
            total += seconds_each * num
            sets.append(ShapeSet(grids, np.full(num, classes.index(name))))
    return join(sets), total / sum(counts.values())


def _sampling_options(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments say of sampling. Raises ConfigError where there is nothing to sample from."""
    given = {name: getattr(args, name) for name in SAMPLING if getattr(args, name) is not None}
    if args.samples and (given or args.batch_size or args.device):
        raise ConfigError(
            "options of sampling would do nothing: they belong to --checkpoint, and --samples are made already"
        )
    if "guidance_interval" in given:
        given["guidance_interval"] = tuple(given["guidance_interval"])
    return given


def _fitting_pipeline(
    args: argparse.Namespace, chosen: Sequence[str], resolution: int, options: dict[str, Any]
) -> tuple[ShapePipeline, dict[str, Any]]:
    """The pipeline, and what its samples depend on beside their class."""
    folder = locate(args.checkpoint)
    pipeline = ShapePipeline.from_pretrained(folder).to(args.device)
    if pipeline.device.type == "cpu":
        keep_freed_memory()
    if not set(chosen) <= set(pipeline.classes) or pipeline.config.resolution != resolution:
        raise ConfigError(
            f"the model makes {', '.join(pipeline.classes)} at {pipeline.config.resolution}^3, the data set holds "
            f"{', '.join(chosen)} at {resolution}^3: use the data set it was trained on, or choose with --class"
        )
    files = {file: (file_facts(folder / file) or {}).get("sha256") for file in (CONFIG_FILE, WEIGHTS_FILE)}
    settings = {
        name: value for name, value in pipeline.settings(seed=args.seed, **options).items() if name != "checkpoint"
    }
    return pipeline, {**files, **settings}


def _kept_samples(path: Path, num: int) -> tuple[Grids, float] | None:
    """The first `num` samples of a file, and the seconds that each took; None where there are not so many."""
    if not path.exists():
        return None
    with np.load(path, allow_pickle=False) as arrays:
        if "seconds_each" not in arrays:
            return None
        rows, seconds_each = arrays["packed"][:num], float(arrays["seconds_each"])
    if len(rows) < num:
        return None
    side = round((8 * rows.shape[1]) ** (1 / 3))
    return np.unpackbits(rows, axis=1).reshape(-1, side, side, side).astype(bool), seconds_each


def _keep_samples(path: Path, grids: Grids, seconds_each: float) -> None:
    with replaced_file(path) as partial:
        np.savez(partial, packed=np.packbits(grids.reshape(len(grids), -1), axis=1), seconds_each=seconds_each)


def _chosen_classes(asked: Sequence[str] | None, known: Sequence[str]) -> list[str]:
    for name in asked or ():
        if name not in known:
            raise ConfigError(unknown_name("class", name, known))
    return list(dict.fromkeys(asked)) if asked else list(known)


if __name__ == "__main__":
    sys.exit(main())
