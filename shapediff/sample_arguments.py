"""The command line of sampling."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from shapediff.diffusion.samplers import SAMPLERS
from shapediff.diffusion.samplers.common import SPACINGS
from shapediff.errors import ConfigError
from shapediff.geometry.printable import MeshOptions, parse_length
from shapediff.pipeline import AXES, NUM_RESAMPLES
from shapediff.shapes import MESH_FORMATS, VOXEL_FORMATS

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
    "draws": "draws",
}
"""Arguments, and the settings of the pipeline that they are."""
EDITS = ("complete", "vary", "interpolate")
OF_EDITS: dict[str, tuple[tuple[str, ...], Any]] = {
    "keep_box": (("complete",), None),
    "resamples": (("complete",), NUM_RESAMPLES),
    "strength": (("vary",), 0.5),
    "input_up": (EDITS, "y"),
    "as_placed": (EDITS, False),
}
"""Arguments of edits: of which, and what they are where they are not given."""
GUIDING = ("guidance", "guidance_interval", "guidance_rescale", "split_batch")
PICTURES = {"preview", "turntable", "html"}
NOT_OF_THE_SHAPES = {"classes", "num", "checkpoint", "out", "batch_size", "device", "local_rank"} | PICTURES
"""Other arguments that may differ between two commands that fill one folder; none of the rest may."""


def parser() -> argparse.ArgumentParser:
    """The command line of sampling."""
    p = argparse.ArgumentParser(
        prog="python -m shapediff.sample",
        description="Generate shapes: meshes that print, or voxels. The same command goes on where it was stopped.",
    )
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
    p.add_argument(
        "--draws",
        type=int,
        metavar="N",
        help="draw a shape that comes in several parts again, up to N times (default: as exported)",
    )
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
    group.add_argument(
        "--height",
        help="real height with its unit: 12cm, 120mm, 0.9m, 35in, 3ft; a bare number is metres (default: the cube is 1 m wide)",
    )
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
    g.add_argument("--resamples", type=int, help=f"how often --complete reworks the fit (default {NUM_RESAMPLES})")
    g.add_argument("--strength", type=float, help="of --vary: 0 is the shape itself, 1 a new one (default 0.5)")
    g.add_argument("--mirror", choices=AXES, help="make every shape symmetric; x is left and right")
    g.add_argument("--input-up", choices=("y", "z"), help="the vertical axis of FILE (default y)")
    g.add_argument(
        "--as-placed",
        action="store_true",
        default=None,
        help="do not fit FILE into the cube: it is placed there already",
    )


def edit_of(args: argparse.Namespace) -> str | None:
    """The name of the edit that the arguments ask for."""
    return next((name for name in EDITS if getattr(args, name)), None)


def settle(args: argparse.Namespace) -> None:
    """Refuse what would do nothing beside the other arguments, then put the defaults in place that depend on these.

    Raises ConfigError, naming the option and where it belongs.
    """
    edit = edit_of(args)
    for name, (edits, default) in OF_EDITS.items():
        if getattr(args, name) is None:
            setattr(args, name, default if edit in edits else None)
        elif edit not in edits:
            owners = " or ".join(f"--{owner}" for owner in edits)
            raise ConfigError(
                f"{_option(name)} belongs to {owners} and would do nothing here; leave it out or add that"
            )
    guiding = [name for name in GUIDING if getattr(args, name) is not None]
    if guiding and not args.classes and edit != "interpolate":
        raise ConfigError(
            f"{_option(guiding[0])} would do nothing: it guides towards a class; add --class, or leave it out"
        )


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def mesh_options(args: argparse.Namespace) -> MeshOptions:
    return MeshOptions(
        surface=args.surface,
        smoothing=args.smoothing,
        max_faces=args.max_faces,
        height=None if args.height is None else parse_length(args.height),
        up=args.up,
        keep_cavities=args.keep_cavities,
        min_part=args.min_part,
    )
