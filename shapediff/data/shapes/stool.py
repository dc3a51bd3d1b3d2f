"""Stools: round or square seats, three or four legs or a pedestal, foot rings and rails."""

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
    path,
    pick,
    rod,
    turned,
    union,
    with_article,
)  # fmt: skip

BASES = ("three legs", "four legs", "a pedestal", "two crossed legs")


def build(rng: np.random.Generator) -> Shape:
    """A low stool, a bar stool or a step stool."""
    kind = pick(rng, ("low stool", "bar stool", "step stool"), (4, 4, 2))
    if kind == "step stool":
        return finish(_steps(rng), "a step stool with two steps")
    height = (0.45 if kind == "low stool" else 0.74) * rng.uniform(0.9, 1.1)
    width = rng.uniform(0.34, 0.42)
    thick = 1.2 * THINNEST * max(height, width)
    seat, base = pick(rng, ("round", "square", "padded")), pick(rng, BASES, (3, 4, 3, 1))
    solids = [_seat(seat, width, height, thick), _base(rng, base, width, height, thick)]
    extras = [base]
    if base in BASES[:2] and rng.random() < 0.6:
        solids.append(_rails(base, width, height, thick))
        extras.append("rails")
    return finish(union(solids), f"{with_article(kind)} with a {seat} seat and {listed(extras)}")


def _seat(seat: str, width: float, height: float, thick: float) -> Solid:
    if seat == "round":
        return cylinder(width / 2, thick, at=(0, height - thick, 0), segments=32)
    if seat == "square":
        return box((width, thick, width), (0, height - thick / 2, 0))
    return turned(
        [
            (0.40 * width, height - 2 * thick),
            (0.5 * width, height - 1.5 * thick),
            (0.5 * width, height - 0.6 * thick),
            (0.36 * width, height),
        ]
    )


def _feet(base: str, width: float) -> list[tuple[float, float]]:
    num_legs = 3 if base == "three legs" else 4
    angles = 2 * np.pi * (np.arange(num_legs) + 0.5) / num_legs
    return [(float(np.sin(a)), float(np.cos(a))) for a in angles]


def _base(rng: np.random.Generator, base: str, width: float, height: float, thick: float) -> Solid:
    under = height - 0.8 * thick
    if base == "a pedestal":
        foot = 0.52 * width * rng.uniform(0.85, 1.05)
        return turned(
            [(foot, 0), (foot, 0.5 * thick), (0.6 * thick, 1.4 * thick), (0.55 * thick, under), (0.3 * width, under)]
        )
    if base == "two crossed legs":
        x, z = 0.42 * width, 0.36 * width
        return union(
            rod((s * x, under, k * z), (-s * x, 0.55 * thick, k * z), 0.55 * thick) for s in (-1, 1) for k in (-1, 1)
        ) + beam((0, height / 2, -z), (0, height / 2, z), thick)
    return union(
        rod(
            (0.36 * width * u, under, 0.36 * width * v),
            (0.56 * width * u, 0.5 * thick, 0.56 * width * v),
            0.62 * thick,
            end_radius=0.5 * thick,
        )
        for u, v in _feet(base, width)
    )


def _rails(base: str, width: float, height: float, thick: float) -> Solid:
    # The legs splay from 0.36 to 0.56 of the width: 0.5 at 0.3 of the height.
    ring = [(0.50 * width * u, 0.3 * height, 0.50 * width * v) for u, v in _feet(base, width)]
    return path([*ring, ring[0]], 0.48 * thick)


def _steps(rng: np.random.Generator) -> Solid:
    width, step = rng.uniform(0.38, 0.46), rng.uniform(0.2, 0.25)
    thick = 1.25 * THINNEST * 2 * step
    x = (width - thick) / 2
    treads = [box((width, thick, 0.22), (0, (n + 1) * step - thick / 2, 0.1 - 0.2 * n)) for n in (0, 1)]
    sides = [
        box((thick, (n + 1) * step, 0.22 - n * 0.02), (i * x, (n + 1) * step / 2, 0.1 - 0.2 * n))
        for n in (0, 1)
        for i in (-1, 1)
    ]
    return union([*treads, *sides])
