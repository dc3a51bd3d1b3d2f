"""Beds: single to double, headboards of four kinds, on legs or a box, four posts now and then."""

from __future__ import annotations

import numpy as np

from shapediff.data.shapes.parts import (
    THINNEST,
    Shape,
    Solid,
    beam,
    box,
    cushion,
    cylinder,
    finish,
    listed,
    path,
    pick,
    union,
    with_article,
)  # fmt: skip

HEADBOARDS = ("a panel headboard", "an arched headboard", "a slatted headboard", "a padded headboard")


def build(rng: np.random.Generator) -> Shape:
    """A bed whose head is at -z."""
    kind = pick(rng, ("single bed", "double bed", "bunk bed"), (3, 4, 1))
    width = (0.98 if kind != "double bed" else 1.6) * rng.uniform(0.95, 1.08)
    length = rng.uniform(1.95, 2.1)
    thick = 1.15 * THINNEST * length
    deck = rng.uniform(0.28, 0.42)
    head, legged = pick(rng, HEADBOARDS), bool(rng.random() < 0.6)
    if kind == "bunk bed":
        return finish(_bunk(rng, width, length, thick), "a bunk bed with two decks and a ladder")

    solids = [_mattress(width, length, deck, thick, pillows=2 if kind == "double bed" else 1)]
    rise = rng.uniform(0.35, 0.6)
    solids.append(_headboard(head, width, length, deck + 0.18 + rise, thick))
    extras = [head]
    if legged:
        foot = 1.2 * thick
        solids += [
            box((foot, deck, foot), (i * (width - foot) / 2, deck / 2, k * (length - foot) / 2))
            for i in (-1, 1)
            for k in (-1, 1)
        ]
        extras.append("four legs")
    else:
        solids.append(box((width, deck, length), (0, deck / 2, 0)))
        extras.append("a box base")
    if rng.random() < 0.35:
        height = deck + rng.uniform(0.2, 0.35)
        solids.append(box((width, height, thick), (0, height / 2, length / 2)))
        extras.append("a footboard")
    elif legged and rng.random() < 0.25:
        top = rng.uniform(1.6, 1.9)
        corners = [(i * (width - thick) / 2, k * (length - thick) / 2) for i, k in ((-1, -1), (1, -1), (1, 1), (-1, 1))]
        solids += [beam((x, 0.5 * thick, z), (x, top, z), thick) for x, z in corners]
        solids += [
            beam((x, top, z), (u, top, w), thick)
            for (x, z), (u, w) in zip(corners, corners[1:] + corners[:1], strict=True)
        ]
        extras.append("four posts")
    return finish(union(solids), f"{with_article(kind)} with {listed(extras)}")


def _mattress(width: float, length: float, deck: float, thick: float, *, pillows: int) -> Solid:
    parts = [
        box((width, thick, length), (0, deck - thick / 2, 0)),
        cushion((width * 0.96, 0.22, length * 0.96), (0, deck + 0.09, 0.01), radius=0.06),
    ]
    share = width / pillows
    for p in range(pillows):
        x = -width / 2 + (p + 0.5) * share
        parts.append(cushion((share * 0.78, 0.15, 0.40), (x, deck + 0.25, -length / 2 + 0.33), radius=0.07))
    return union(parts)


def _headboard(kind: str, width: float, length: float, top: float, thick: float) -> Solid:
    z = -length / 2
    if kind == "a panel headboard":
        return box((width, top, thick), (0, top / 2, z))
    if kind == "a padded headboard":
        return cushion((width * 1.04, top * 0.8, 1.6 * thick), (0, top * 0.6, z), radius=0.07) + box(
            (width, top * 0.5, thick), (0, top * 0.25, z)
        )
    if kind == "an arched headboard":
        disc = cylinder(0.5, thick, at=(0, -thick / 2, 0), segments=40).rotate([90, 0, 0]).scale([width, 0.7 * top, 1])
        return disc.translate([0, top * 0.65, z]) + box((width, top * 0.65, thick), (0, top * 0.325, z))
    x = (width - thick) / 2
    num_slats = 3 if width < 1.2 else 5
    posts = [beam((s, thick / 2, z), (s, top, z), thick) for s in np.linspace(-x, x, num_slats + 2)]
    return union([*posts, beam((-x, top, z), (x, top, z), thick * 1.15)])


def _bunk(rng: np.random.Generator, width: float, length: float, thick: float) -> Solid:
    low, high = rng.uniform(0.32, 0.42), rng.uniform(1.25, 1.4)
    top = high + rng.uniform(0.3, 0.4)
    x, z = (width - thick) / 2, (length - thick) / 2
    parts = [_mattress(width, length, deck, thick, pillows=1) for deck in (low, high)]
    parts += [beam((i * x, thick / 2, k * z), (i * x, top, k * z), thick) for i in (-1, 1) for k in (-1, 1)]
    parts += [beam((-x, top, k * z), (x, top, k * z), thick) for k in (-1, 1)]
    ladder = [path([(x, thick / 2, s), (x, high, s)], thick / 2) for s in (0.2 * length, 0.38 * length)]
    rungs = [beam((x, y, 0.2 * length), (x, y, 0.38 * length), thick * 0.95) for y in np.linspace(0.2, high, 6)[:-1]]
    return union([*parts, *ladder, *rungs])
