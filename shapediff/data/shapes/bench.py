"""Benches: with and without back and arms, of planks or solid, for the park, the hall and the table."""

from __future__ import annotations

import numpy as np

from shapediff.data.shapes.parts import (
    THINNEST,
    Shape,
    Solid,
    beam,
    box,
    finish,
    listed,
    pick,
    rod,
    union,
    with_article,
)

SUPPORTS = ("four legs", "two panels", "X-shaped legs", "a solid block")


def build(rng: np.random.Generator) -> Shape:
    """A bench, long in x."""
    width, depth, height = rng.uniform(1.05, 1.6), rng.uniform(0.36, 0.48), rng.uniform(0.42, 0.48)
    thick = 1.1 * THINNEST * width
    support, has_back, planks = pick(rng, SUPPORTS, (4, 3, 2, 1)), bool(rng.random() < 0.55), bool(rng.random() < 0.4)
    solids = [_seat(width, depth, height, thick, planks=planks), _support(support, width, depth, height, thick)]
    extras = [support]
    if has_back:
        rise = rng.uniform(0.36, 0.5)
        solids.append(_back(rng, width, depth, height, rise, thick))
        extras.append("a back")
        if rng.random() < 0.5:
            solids.append(_arms(width, depth, height, thick))
            extras.append("arms")
    kind = "plank bench" if planks else "bench"
    return finish(union(solids), f"{with_article(kind)} with {listed(extras)}")


def _seat(width: float, depth: float, height: float, thick: float, *, planks: bool) -> Solid:
    if not planks:
        return box((width, thick, depth), (0, height - thick / 2, 0))
    gap = 1.35 * thick
    plank = (depth - gap) / 2
    seat = [box((width, thick, plank), (0, height - thick / 2, k * (depth - plank) / 2)) for k in (-1, 1)]
    ties = [box((thick, thick, depth), (i * 0.36 * width, height - thick * 0.8, 0)) for i in (-1, 1)]
    return union([*seat, *ties])


def _support(support: str, width: float, depth: float, height: float, thick: float) -> Solid:
    under, x, z = height - thick * 0.6, 0.40 * width, depth / 2 - thick / 2
    if support == "four legs":
        return union(
            beam((i * x, under, k * z), (i * x, thick / 2, k * z), thick * 1.05) for i in (-1, 1) for k in (-1, 1)
        )
    if support == "two panels":
        return union(box((thick * 1.1, under, depth), (i * x, under / 2, 0)) for i in (-1, 1))
    if support == "a solid block":
        return box((width * 0.86, under, depth * 0.8), (0, under / 2, 0))
    return union(
        rod((i * x, under, k * z), (i * x, 0.55 * thick, -k * z), 0.55 * thick) for i in (-1, 1) for k in (-1, 1)
    ) + beam((-x, under / 2, 0), (x, under / 2, 0), thick)


def _back(rng: np.random.Generator, width: float, depth: float, height: float, rise: float, thick: float) -> Solid:
    z, top, x = -depth / 2 + thick / 2, height + rise, 0.40 * width
    lean = rng.uniform(0, 0.06)
    posts = [beam((i * x, height - thick / 2, z), (i * x, top, z - lean), thick) for i in (-1, 1)]
    kind = pick(rng, ("rails", "slats", "board"))
    rail = beam((-width / 2, top, z - lean), (width / 2, top, z - lean), thick * 1.15)
    if kind == "rails":
        return union(
            [
                *posts,
                rail,
                beam(
                    (-width / 2, height + 0.5 * rise, z - lean / 2),
                    (width / 2, height + 0.5 * rise, z - lean / 2),
                    thick * 1.1,
                ),
            ]
        )
    if kind == "slats":
        slats = [
            beam((s, height - thick / 2, z), (s, top, z - lean), thick * 0.95) for s in np.linspace(-x, x, 6)[1:-1]
        ]
        return union([*posts, rail, *slats])
    return union([*posts, box((width, rise * 0.6, thick), (0, top - rise * 0.3, z - lean * 0.7))])


def _arms(width: float, depth: float, height: float, thick: float) -> Solid:
    x, y = width / 2 - thick / 2, height + 0.21
    parts = []
    for i in (-1, 1):
        parts.append(beam((i * x, y, -depth / 2), (i * x, y, depth / 2 - thick / 2), thick))
        parts += [
            beam(
                (i * x, height - thick / 2, k * (depth / 2 - thick / 2)), (i * x, y, k * (depth / 2 - thick / 2)), thick
            )
            for k in (-1, 1)
        ]
    return union(parts)
