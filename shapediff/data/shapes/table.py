"""Tables: round, oval and rectangular tops on legs, pedestals, trestles and panels."""

from __future__ import annotations

import numpy as np

from shapediff.data.shapes.parts import (
    THINNEST,
    Shape,
    Solid,
    beam,
    box,
    cylinder,
    finish,
    listed,
    pick,
    rod,
    turned,
    union,
    with_article,
)  # fmt: skip

TOPS = ("rectangular", "square", "round", "oval")
BASES = ("four legs", "four tapered legs", "a turned pedestal", "a trestle", "two side panels")


def build(rng: np.random.Generator) -> Shape:
    """A dining, coffee, side or high table."""
    kind = pick(rng, ("dining table", "coffee table", "side table", "bar table"), (4, 3, 2, 1))
    top, base = pick(rng, TOPS, (4, 2, 3, 1)), pick(rng, BASES, (4, 3, 2, 2, 2))
    height = {"dining table": 0.74, "coffee table": 0.42, "side table": 0.55, "bar table": 1.02}[kind] * rng.uniform(
        0.94, 1.06
    )
    width = {"dining table": 1.15, "coffee table": 0.95, "side table": 0.50, "bar table": 0.62}[kind] * rng.uniform(
        0.85, 1.15
    )
    if base in ("a trestle", "two side panels") and top in ("round", "oval"):
        top = "rectangular"
    depth = width * (rng.uniform(0.5, 0.72) if top in ("rectangular", "oval") else 1.0)
    thick = 1.1 * THINNEST * max(width, height)

    solids = [_top(top, width, depth, height, thick), _base(rng, base, top, width, depth, height, thick)]
    extras = [base]
    if base in BASES[:2] and rng.random() < 0.3 and height > 5 * thick:
        inset = _inset(top)  # the shelf reaches the middle of the legs, wherever they splay to
        x, z = (inset * side - thick + 0.08 * height for side in (width, depth))
        solids.append(box((x, thick, z), (0, height * rng.uniform(0.2, 0.35), 0)))
        extras.append("a lower shelf")
    return finish(union(solids), f"{with_article(f'{top} {kind}')} on {listed(extras)}")


def _inset(top: str) -> float:
    """How far out legs stand, as a part of the top."""
    return 0.62 if top in ("round", "oval") else 0.88


def _top(top: str, width: float, depth: float, height: float, thick: float) -> Solid:
    if top in ("rectangular", "square"):
        return box((width, thick, depth), (0, height - thick / 2, 0))
    disc = cylinder(width / 2, thick, at=(0, height - thick, 0), segments=40)
    return disc.scale([1, 1, depth / width])


def _base(
    rng: np.random.Generator, base: str, top: str, width: float, depth: float, height: float, thick: float
) -> Solid:
    inset = _inset(top)
    x, z = inset * width / 2 - thick / 2, inset * depth / 2 - thick / 2
    under = height - thick / 2
    if base in BASES[:2]:
        tapers = base == BASES[1]
        leg = thick * rng.uniform(1.05, 1.5)
        make, scale = (rod, 0.5) if tapers else (beam, 1.0)
        splay = rng.uniform(0.0, 0.10) * height if tapers else 0.0
        foot = max(0.65 * leg, 0.92 * thick) if tapers else leg
        end = {"end_radius" if make is rod else "end_size": scale * foot}
        return union(
            make((i * x, under - leg * 0.3, k * z), (i * (x + splay), foot / 2, k * (z + splay)), scale * leg, **end)
            for i in (-1, 1)
            for k in (-1, 1)
        )
    if base == "a turned pedestal":
        foot = 0.30 * min(width, depth) * rng.uniform(0.9, 1.15)
        waist = max(0.6 * thick, 0.07 * min(width, depth))
        profile = [(foot, 0.0), (foot, 0.6 * thick), (waist, 0.22 * height), (waist * rng.uniform(1.0, 1.6), 0.55 * height),
                   (waist, 0.8 * height), (foot * 0.7, under)]  # fmt: skip
        return turned(profile)
    if base == "two side panels":
        return union(box((thick, under, depth * 0.92), (i * (width / 2 - thick / 2), under / 2, 0)) for i in (-1, 1))
    spread = 0.42 * depth
    parts = [beam((-0.3 * width, 0.3 * height, 0), (0.3 * width, 0.3 * height, 0), thick)]
    for i in (-0.3, 0.3):
        parts += [
            rod((i * width, under, k * 0.25 * depth), (i * width, 0.5 * thick, k * spread), 0.55 * thick)
            for k in (-1, 1)
        ]
        parts.append(beam((i * width, 0.3 * height, -0.34 * depth), (i * width, 0.3 * height, 0.34 * depth), thick))
    return union(parts)
