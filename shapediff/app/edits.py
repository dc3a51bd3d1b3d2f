"""The edits that the page offers: each reads its part of a form and says what the pipeline is to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from shapediff.app.settings import MAX_SEED, MAX_SHAPES, SIDES, Settings, mixture, number, one_of, whole
from shapediff.diffusion.samplers import OnStep
from shapediff.pipeline import ShapePipeline
from shapediff.shapes import Shapes

Voxels = Float[Tensor, "x y z"]
Form = Mapping[str, Any]
"""The values of a form by name, as posted: anything."""

Read = Callable[[str], Voxels]
"""The voxels that the form names as "source" or as "target": a shape that was made here, or a mesh that was brought."""

Job = Callable[[OnStep], Shapes]
BETWEEN = ("two seeds", "two classes", "two shapes")
MIN_SHARE, MAX_SHARE = 0.1, 0.9


def complete(pipeline: ShapePipeline, chosen: Settings, form: Form, read: Read) -> Job:
    """Keep one side of a shape, generate the rest."""
    side, share = one_of("side to keep", form["side"], SIDES), number("share", form["share"], MIN_SHARE, MAX_SHARE)
    voxels = read("source")
    keep = kept_side(len(voxels), side, share)
    return lambda step: pipeline.complete(
        voxels, keep, chosen.num, label=chosen.label, on_step=step, **chosen.options()
    )


def vary(pipeline: ShapePipeline, chosen: Settings, form: Form, read: Read) -> Job:
    """The same shape again, differently: noise to a strength, and back."""
    strength = number("strength", form["strength"], 0.0, 1.0)
    voxels = read("source")
    return lambda step: pipeline.vary(
        voxels, strength, chosen.num, label=chosen.label, on_step=step, **chosen.options()
    )


def interpolate(pipeline: ShapePipeline, chosen: Settings, form: Form, read: Read) -> Job:
    """The way from one shape to another, as many shapes as asked for."""
    between = one_of("ends", form["between"], BETWEEN)
    num = whole("number of shapes", form["num"], 2, MAX_SHAPES)
    if between == "two seeds":
        ends: tuple[Any, Any] = chosen.seed, whole("second seed", form["second_seed"], 0, MAX_SEED)
    elif between == "two classes":
        first = one_of("class", form["label"], pipeline.classes)
        ends = first, one_of("second class", form["second_label"], pipeline.classes)
    else:
        ends = read("source"), read("target")
    return lambda step: pipeline.interpolate(*ends, num, label=chosen.label, on_step=step, **chosen.options())


def mix(pipeline: ShapePipeline, chosen: Settings, form: Form, read: Read) -> Job:
    """Shapes of one class with something of another."""
    label = mixture(pipeline.classes, form["label"], form["second_label"], form["second_share"])
    return lambda step: pipeline(chosen.num, label=label, on_step=step, **chosen.options())


EDITS = {"Complete": complete, "Vary": vary, "Interpolate": interpolate, "Mix classes": mix}

_ENDS = {  # axis, and whether the side is where that axis begins: y is up, +z the front
    "left": (0, True),
    "right": (0, False),
    "bottom": (1, True),
    "top": (1, False),
    "back": (2, True),
    "front": (2, False),
}


def kept_side(resolution: int, side: str, share: float) -> Bool[Tensor, "x y z"]:
    """True in that share of the cube, at least one layer of voxels, counted from one of SIDES."""
    axis, is_low = _ENDS[side]
    layers = max(1, round(share * resolution))
    keep = torch.zeros((resolution,) * 3, dtype=torch.bool)
    keep.narrow(axis, 0 if is_low else resolution - layers, layers).fill_(True)
    return keep
