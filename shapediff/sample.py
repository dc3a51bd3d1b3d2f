"""Generate meshes: `python -m shapediff.sample --class chair --guidance 3`."""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from shapediff.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from shapediff.config_io import unknown_name
from shapediff.diffusion.samplers import SAMPLERS
from shapediff.diffusion.samplers.common import SPACINGS
from shapediff.editing import box_mask, parse_label, read_voxels
from shapediff.errors import ConfigError, MeshError, ShapediffError
from shapediff.gallery import MANIFEST_FILE, Gallery, Line, file_facts, open_gallery
from shapediff.geometry.pictures import Pictures
from shapediff.geometry.printable import MeshOptions, parse_length
from shapediff.hub import default_checkpoint, locate
from shapediff.labels import Label, shape_name
from shapediff.pipeline import AXES, NUM_RESAMPLES, ShapePipeline
from shapediff.progress import GalleryProgress, Stopped, stoppable
from shapediff.ranks import ranks_from
from shapediff.shapes import MESH_FORMATS, VOXEL_FORMATS, Shapes, check_format
from shapediff.writing import open_writer

if TYPE_CHECKING:
    import trimesh

DEFAULT_OUT = Path("samples")
MAX_PICTURED = 128
SETTINGS = {
    "seed": "seed",
    "precision": "precision",
    "guidance": "guidance_scale",
    "guidance_interval": "guidance_interval",
    "guidance_rescale": "guidance_rescale",
    "split_batch": "split_batch",
    "steps": "num_steps",
    "sampler": "sampler",
    "eta": "eta",
    "spacing": "spacing",
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
}
"""Arguments, and the settings of the pipeline that they are."""
EDITS = ("complete", "vary", "interpolate")
PICTURES = {"preview", "turntable", "html"}
NOT_OF_THE_SHAPES = {"classes", "num", "checkpoint", "out", "batch_size", "device", "local_rank"} | PICTURES
"""Other arguments that may differ between two commands that fill one folder; none of the rest may."""


def parser() -> argparse.ArgumentParser:
    """The command line of sampling."""
    p = argparse.ArgumentParser(prog="python -m shapediff.sample", description=__doc__)
    p.add_argument(
        "--class", dest="classes", nargs="+", metavar="CLASS", help="class names, or 'all'; without it, no class"
    )
    p.add_argument(
        "--checkpoint",
        help="a run, an export, a model that comes with shapediff, or user/name on the Hugging Face hub "
        "(default: the newest under runs/, else what comes with shapediff)",
    )
    p.add_argument("--num", "-n", type=int, default=4, help="shapes of each class (default 4)")
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
    p.add_argument("--temperature", type=float, help="of the choice of tokens, for autoregressive models (default 1)")
    p.add_argument("--top-k", type=int, help="choose among the k likeliest tokens alone")
    p.add_argument("--top-p", type=float, help="choose among the likeliest tokens that reach this probability together")
    p.add_argument("--seed", type=int, default=0, help="the same seed gives the same shapes (default 0)")
    p.add_argument(
        "--out",
        type=Path,
        help="folder to write to, or to go on with (default samples/, or samples-2/ beside other shapes)",
    )
    p.add_argument("--format", choices=MESH_FORMATS + VOXEL_FORMATS, default="obj", help="of the files (default obj)")
    p.add_argument(
        "--batch-size", type=int, help="shapes that a GPU computes together (default: as many as its memory holds)"
    )
    p.add_argument("--device", help="cpu, cuda, cuda:1 ... (default: a GPU if there is one)")
    p.add_argument("--precision", choices=("float32", "bf16"), help="default: bf16 where the machine is faster at it")
    p.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # launchers add it
    _add_mesh_arguments(p)
    _add_pictures(p)
    _add_edits(p)
    return p


def _add_mesh_arguments(p: argparse.ArgumentParser) -> None:
    default = MeshOptions()
    group = p.add_argument_group("meshes")
    group.add_argument("--surface", choices=("smooth", "blocks"), default=default.surface, help="default smooth")
    group.add_argument(
        "--smoothing", type=int, default=default.smoothing, help=f"iterations; 0 is none (default {default.smoothing})"
    )
    group.add_argument("--max-faces", type=int, help="simplify to this many (default: as many as there are)")
    group.add_argument("--height", help="real height, such as 0.9m, 90cm, 35in (default: the cube is 1 m wide)")
    group.add_argument("--up", choices=("y", "z"), default=default.up, help="axis that points up (default y)")
    group.add_argument("--keep-cavities", action="store_true", help="do not fill hollows that nothing leads to")
    group.add_argument(
        "--min-part", type=float, default=default.min_part, help="remove parts below this share of the largest (0.05)"
    )


def _add_pictures(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("pictures", "drawn without a display or a GPU, beside the meshes")
    most = f"{MAX_PICTURED} shapes at most"
    group.add_argument(
        "--preview", action="store_true", help=f"preview.png: a sheet of the shapes, a row for each class; {most}"
    )
    group.add_argument("--turntable", action="store_true", help="turntable.gif: the shapes turning, 32 at most")
    group.add_argument(
        "--html", action="store_true", help=f"shapes.html: one file with the shapes to turn and download; {most}"
    )


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


def _mesh_options(args: argparse.Namespace) -> MeshOptions:
    return MeshOptions(
        surface=args.surface,
        smoothing=args.smoothing,
        max_faces=args.max_faces,
        height=None if args.height is None else parse_length(args.height),
        up=args.up,
        keep_cavities=args.keep_cavities,
        min_part=args.min_part,
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
    except KeyboardInterrupt:  # before there was anything to keep
        return 128 + signal.SIGINT


def run(args: argparse.Namespace) -> int:
    """Sample what the arguments ask for and is not there yet, or this process's share of it; each shape is written at once."""
    if args.num < 1:
        raise ConfigError(f"--num {args.num} must be at least 1")
    mesh_options = _mesh_options(args)
    check_format(args.format, mesh_options)
    ranks = ranks_from(os.environ)
    checkpoint = locate(args.checkpoint) if args.checkpoint else default_checkpoint()
    if ranks.is_main and not args.checkpoint:
        print(f"checkpoint: {checkpoint}", file=sys.stderr)
    pipeline = ShapePipeline.from_pretrained(checkpoint).to(ranks.use_device(args.device))
    labels = _labels(args.classes, pipeline.classes)
    options = _options(args)
    request = _request(args, checkpoint, pipeline.settings(**options))
    gallery = open_gallery(args.out or DEFAULT_OUT, request, rank=ranks.rank, beside=args.out is None)
    shapes = {
        shape_name(label, number, _edit_of(args)): (label, number) for label in labels for number in range(args.num)
    }
    todo = set(gallery.missing(ranks.share(list(shapes))))
    progress = GalleryProgress(gallery, list(shapes), shown=ranks.is_main)
    drawn = set(_drawn(args, labels)) if ranks.is_main else set()
    meshes: dict[str, trimesh.Trimesh | None] = {}
    try:
        with (
            stoppable(),
            gallery.merged(at_end=ranks.is_main),
            progress,
            open_writer(
                gallery, args.format, mesh_options, num=len(todo), device=pipeline.device, ranks=ranks
            ) as writer,
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
                    meshes |= _meshes(batch, drawn, mesh_options)
            writer.take()
            if ranks.is_main:
                progress.wait_for_others()
    except Stopped as stopped:
        if ranks.is_main:
            done = f"{gallery.count(shapes)} of {len(shapes)} shapes are in {gallery.directory}"
            print(f"\nstopped: {done}; the same command goes on", file=sys.stderr)
        return 128 + stopped.signal
    return _report(args, gallery, list(shapes), _drawn(args, labels), meshes) if ranks.is_main else 0


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
    return {**weights, **settings, "checkpoint": None, **plain}


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
    what = "meshes" if args.format in MESH_FORMATS else "voxel files"
    empty = f", {len(lines) - num_written} empty ones left out" if num_written < len(lines) else ""
    print(f"{num_written} {what} in {out} ({args.format}){empty}; listed in {out / MANIFEST_FILE}")
    if len(lines) < len(names):
        print(
            f"error: {len(names) - len(lines)} shapes of other ranks are missing; the same command makes them",
            file=sys.stderr,
        )
    return 0 if num_written and len(lines) == len(names) else 1


def _labels(asked: Sequence[str] | None, known: Sequence[str]) -> list[Label]:
    if not asked:
        return [None]
    labels: list[Label] = [parse_label(text, known) for text in dict.fromkeys(asked)]
    for label in labels:
        if isinstance(label, str) and label not in known and label != "all":
            raise ConfigError(unknown_name("class", label, known))
    return list(known) if "all" in labels else labels


def _edit_of(args: argparse.Namespace) -> str | None:
    """The name of the edit that the arguments ask for."""
    return next((name for name in EDITS if getattr(args, name)), None)


def _sampled(
    pipeline: ShapePipeline, args: argparse.Namespace, numbers: Sequence[int], options: dict[str, Any]
) -> Iterable[Shapes]:
    """The shapes of these numbers and one label, edited where the arguments say so: an edit comes as one batch."""
    options = {**options, "mirror": args.mirror}

    def read(path: str) -> Tensor:
        return read_voxels(path, pipeline.config, up=args.input_up, is_placed=args.as_placed)

    if args.complete:
        voxels, box = read(args.complete), args.keep_box
        keep = voxels > 0 if box is None else box_mask(box, pipeline.config.resolution)
        return [pipeline.complete(voxels, keep, numbers, num_resamples=args.resamples, **options)]
    if args.vary:
        return [pipeline.vary(read(args.vary), args.strength, numbers, **options)]
    if args.interpolate:
        a, b = (_end(text, pipeline.classes, read) for text in args.interpolate)
        return [pipeline.interpolate(a, b, args.num, **options)]
    return pipeline.stream(numbers, **options)


def _end(text: str, classes: Sequence[str], read: Callable[[str], Tensor]) -> int | Label | Tensor:
    """One end of an interpolation: a seed, a class or mixture, or else a file."""
    if text.isdigit():
        return int(text)
    if text in classes:
        return text
    return (
        read(text) if Path(text.rpartition(":")[0] or text).exists() or ":" not in text else parse_label(text, classes)
    )


def _drawn(args: argparse.Namespace, labels: Sequence[Label]) -> list[str]:
    """The shapes that are drawn: all, or where these are too many the first of each class."""
    if not any(getattr(args, name) for name in PICTURES):
        return []
    num = min(args.num, max(1, MAX_PICTURED // len(labels)))
    return [shape_name(label, number, _edit_of(args)) for label in labels for number in range(num)]


def _meshes(shapes: Shapes, names: set[str], options: MeshOptions) -> dict[str, trimesh.Trimesh | None]:
    """The meshes of those of `names` that are among these shapes, y up; None for an empty one."""
    found: dict[str, trimesh.Trimesh | None] = {}
    for i, name in enumerate(shapes.names):
        if name in names:
            try:
                found[name] = shapes.mesh(i, replace(options, up="y"))
            except MeshError:
                found[name] = None
    return found


def _pictures(
    args: argparse.Namespace, lines: list[Line], meshes: dict[str, trimesh.Trimesh | None], out: Path
) -> Pictures:
    """What is to be drawn; what was there before, or was made by another process, comes from its file."""
    pictures = Pictures(sheet=args.preview, turntable=args.turntable, page=args.html, columns=min(args.num, 8))
    for line in lines:
        mesh = meshes[line["name"]] if line["name"] in meshes else _written_mesh(out, line)
        pictures.add(mesh, line["name"], line["class"] or "shapes")
    return pictures


def _written_mesh(out: Path, line: Line) -> trimesh.Trimesh | None:
    """None where there is none: an empty shape, or voxels."""
    from shapediff.geometry.mesh import load_mesh

    return load_mesh(out / line["file"], up=line["mesh"]["up"]) if line["file"] and "mesh" in line else None


if __name__ == "__main__":
    sys.exit(main())
