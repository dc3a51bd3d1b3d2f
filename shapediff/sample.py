"""Generate meshes: `python -m shapediff.sample --class chair --guidance 3`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from shapediff.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from shapediff.config_io import unknown_name
from shapediff.editing import box_mask, parse_label, read_voxels, split_number
from shapediff.errors import ConfigError, ShapediffError
from shapediff.gallery import MANIFEST_FILE, Gallery, Line, file_facts, open_gallery
from shapediff.geometry.pictures import Pictures
from shapediff.geometry.printable import length_text
from shapediff.hardware import keep_freed_memory
from shapediff.hub import default_checkpoint, locate
from shapediff.labels import Label, label_weights, shape_name
from shapediff.pipeline import ShapePipeline
from shapediff.progress import GalleryProgress, Stopped, stoppable
from shapediff.ranks import ranks_from
from shapediff.sample_arguments import (
    MAX_PICTURED,
    NOT_OF_THE_SHAPES,
    PICTURES,
    SETTINGS,
    edit_of,
    mesh_options,
    parser,
    settle,
)
from shapediff.shapes import MESH_FORMATS, VOXEL_FORMATS, Shapes, check_format
from shapediff.writing import open_writer

if TYPE_CHECKING:
    import trimesh

DEFAULT_OUT = Path("samples")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    args = parser().parse_args(arguments)
    try:
        return run(args)
    except ShapediffError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:  # before there was anything to keep
        return 128 + signal.SIGINT


def run(args: argparse.Namespace) -> int:
    """Sample what the arguments ask for and is not there yet, or this process's share of it; each shape is written at once."""
    if args.num < 1:
        raise ConfigError(f"--num {args.num} must be at least 1")
    settle(args)
    mesh = mesh_options(args)
    check_format(args.format, mesh, is_drawn=any(getattr(args, name) for name in PICTURES))
    ranks = ranks_from(os.environ)
    checkpoint = locate(args.checkpoint) if args.checkpoint else default_checkpoint()
    if ranks.is_main and not args.checkpoint:
        print(f"checkpoint: {checkpoint}", file=sys.stderr)
    pipeline = ShapePipeline.from_pretrained(checkpoint).to(ranks.use_device(args.device))
    if pipeline.device.type == "cpu":
        keep_freed_memory()
    labels = _labels(args.classes, pipeline.classes)
    if args.interpolate and len(labels) > 1:
        raise ConfigError(f"--interpolate makes one row of shapes, of one --class or none, found {len(labels)}")
    options = _options(args)
    request = _request(args, checkpoint, pipeline.settings(**options))
    gallery = open_gallery(args.out or DEFAULT_OUT, request, rank=ranks.rank, beside=args.out is None)
    shapes = {
        shape_name(label, number, edit_of(args)): (label, number) for label in labels for number in range(args.num)
    }
    todo = set(gallery.missing(ranks.share(list(shapes))))
    progress = GalleryProgress(gallery, list(shapes), shown=ranks.is_main)
    drawn = _drawn(args, labels) if ranks.is_main else []
    meshes: dict[str, trimesh.Trimesh | None] = {}
    try:
        with (
            stoppable(),
            gallery.merged(at_end=ranks.is_main),
            progress,
            open_writer(gallery, args.format, mesh, num=len(todo), device=pipeline.device, ranks=ranks) as writer,
        ):
            for label in labels:
                numbers = [number for name, (of, number) in shapes.items() if of == label and name in todo]
                if not numbers:
                    continue
                on_step = progress.start(len(numbers))
                more = {"label": label, "batch_size": args.batch_size, "on_step": on_step, **options}
                for batch in _sampled(pipeline, args, numbers, more):
                    writer.put(batch)
                    progress.wrote(len(batch))
                    if args.format in VOXEL_FORMATS:  # other meshes are read from their files
                        meshes |= {
                            name: batch.mesh_or_none(i, mesh) for i, name in enumerate(batch.names) if name in drawn
                        }
            writer.take()
            if ranks.is_main:
                progress.wait_for_others()
    except Stopped as stopped:
        if ranks.is_main:
            done = f"{gallery.count(shapes)} of {len(shapes)} shapes are in {gallery.directory}"
            print(f"\nstopped: {done}; the same command goes on", file=sys.stderr)
        return 128 + stopped.signal
    except ShapediffError:
        if ranks.world_size == 1:  # others may be making their first shapes
            gallery.leave()
        raise
    return _report(args, gallery, list(shapes), drawn, meshes) if ranks.is_main else 0


def _options(args: argparse.Namespace) -> dict[str, Any]:
    """What the arguments say of sampling; what they do not say is as exported."""
    values = {setting: getattr(args, name) for name, setting in SETTINGS.items()}
    values["guidance_interval"] = args.guidance_interval and tuple(args.guidance_interval)
    return {setting: value for setting, value in values.items() if value is not None}


def _request(args: argparse.Namespace, checkpoint: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What the shapes depend on, with defaults resolved: one that is spelled out makes no other request."""
    weights = {file: (file_facts(checkpoint / file) or {}).get("sha256") for file in (CONFIG_FILE, WEIGHTS_FILE)}
    others = {name: value for name, value in vars(args).items() if name not in NOT_OF_THE_SHAPES | SETTINGS.keys()}
    plain = {name: str(value) if isinstance(value, Path) else value for name, value in others.items()}
    edit = edit_of(args)
    ends = args.interpolate or [getattr(args, edit)] if edit else []
    files = {
        f"content of {end}": facts["sha256"] for end in ends if (facts := file_facts(split_number(end)[0])) is not None
    }
    # The shapes of an interpolation are called by their numbers alone.
    of_class = {"classes": args.classes} if args.interpolate else {}
    return {**weights, **settings, "checkpoint": None, **plain, **files, **of_class}


def _report(
    args: argparse.Namespace,
    gallery: Gallery,
    names: list[str],
    drawn: list[str],
    meshes: dict[str, trimesh.Trimesh | None],
) -> int:
    """Draw, say what there is now; returns the exit status."""
    lines, out = gallery.lines(names), gallery.directory
    for path in _pictures(args, gallery.lines(drawn), meshes, out).save(out):
        print(f"picture: {path}")
    num_written = sum(line["file"] is not None for line in lines)
    what = ("mesh", "meshes") if args.format in MESH_FORMATS else ("voxel file", "voxel files")
    size = _size_text(lines)
    empty = f", {len(lines) - num_written} empty ones left out" if num_written < len(lines) else ""
    written = f"{num_written} {what[num_written != 1]} in {out} ({args.format}{size})"
    print(f"{written}{empty}; listed in {out / MANIFEST_FILE}")
    if len(lines) < len(names):
        print(
            f"error: {len(names) - len(lines)} shapes of other ranks are missing; the same command makes them",
            file=sys.stderr,
        )
    return 0 if num_written and len(lines) == len(names) else 1


def _size_text(lines: Sequence[Line]) -> str:
    """How high the meshes are: --height 12 is 12 metres, and whoever meant centimetres sees it here."""
    heights = [line["size"]["yz".index(line["mesh"]["up"]) + 1] for line in lines if "mesh" in line]
    if not heights:
        return ""
    low, high = length_text(min(heights)), length_text(max(heights))
    return f", {low} high" if low == high else f", {low} to {high} high"


def _labels(asked: Sequence[str] | None, known: Sequence[str]) -> list[Label]:
    if not asked:
        return [None]
    labels: list[Label] = [parse_label(text, known) for text in dict.fromkeys(asked)]
    for label in labels:
        if label != "all":
            label_weights(label, known)  # which refuses what there is not
    return list(known) if "all" in labels else labels


def _sampled(
    pipeline: ShapePipeline, args: argparse.Namespace, numbers: Sequence[int], options: dict[str, Any]
) -> Iterator[Shapes]:
    """The shapes of these numbers and one label, edited where the arguments say so; an interpolation comes as one batch."""
    options = {**options, "mirror": args.mirror}
    edit = edit_of(args)
    if edit is None:
        yield from pipeline.stream(numbers, **options)
        return

    def read(path: str) -> Tensor:
        return read_voxels(path, pipeline.config, up=args.input_up, is_placed=args.as_placed)

    if edit == "interpolate":
        a, b = (_end(text, pipeline.classes, read) for text in args.interpolate)
        yield pipeline.interpolate(a, b, args.num, **options)
        return
    voxels, box = read(getattr(args, edit)), args.keep_box
    keep = voxels > 0 if box is None else box_mask(box, pipeline.config.resolution)
    if edit == "vary":
        yield from pipeline.stream_variations(voxels, args.strength, numbers, **options)
    else:
        yield from pipeline.stream_completions(voxels, keep, numbers, num_resamples=args.resamples, **options)


def _end(text: str, classes: Sequence[str], read: Callable[[str], Tensor]) -> int | Label | Tensor:
    """One end of an interpolation: a seed, a class or mixture, or else a file."""
    if text.isdigit():
        return int(text)
    if text in classes:
        return text
    if ":" not in text and not Path(text).suffix:
        raise ConfigError(f"{text} is no seed and no file, and {unknown_name('class', text, classes)}")
    return (
        read(text) if Path(text.rpartition(":")[0] or text).exists() or ":" not in text else parse_label(text, classes)
    )


def _drawn(args: argparse.Namespace, labels: Sequence[Label]) -> list[str]:
    """The shapes that are drawn: all, or where these are too many the first of each class."""
    if not any(getattr(args, name) for name in PICTURES):
        return []
    num = min(args.num, max(1, MAX_PICTURED // len(labels)))
    return [shape_name(label, number, edit_of(args)) for label in labels for number in range(num)]


def _pictures(
    args: argparse.Namespace, lines: list[Line], meshes: dict[str, trimesh.Trimesh | None], out: Path
) -> Pictures:
    """What is to be drawn, from the files, or from `meshes` where these are of voxels."""
    pictures = Pictures(sheet=args.preview, turntable=args.turntable, page=args.html, columns=min(args.num, 8))
    for line in lines:
        mesh = meshes[line["name"]] if line["name"] in meshes else _written_mesh(out, line)
        pictures.add(mesh, line["name"], line["class"] or "shapes")
    return pictures


def _written_mesh(out: Path, line: Line) -> trimesh.Trimesh | None:
    """In metres, y up; None where there is none: an empty shape, or voxels that another command wrote."""
    from shapediff.geometry.export import units_a_metre
    from shapediff.geometry.mesh import load_mesh

    if not line["file"] or "mesh" not in line:
        return None
    path = out / line["file"]
    return load_mesh(path, up=line["mesh"]["up"]).apply_scale(1 / units_a_metre(path.suffix))


if __name__ == "__main__":
    sys.exit(main())
