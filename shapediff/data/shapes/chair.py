"""Chairs: dining, lounge, office and bar; what carries them, what one leans on, arms and cushions."""

from __future__ import annotations

import numpy as np

from shapediff.data.shapes.parts import (
    THINNEST,
    Shape,
    Solid,
    arc,
    beam,
    box,
    cushion,
    cylinder,
    finish,
    listed,
    path,
    pick,
    rod,
    union,
    with_article,
)  # fmt: skip

BACKS = ("slatted", "solid", "round", "ladder")
BASES = ("four straight legs", "four tapered legs", "a pedestal with a star base", "sled runners", "rocking runners")


def build(rng: np.random.Generator) -> Shape:
    """A chair of one of three heights, with one of four backs and five bases."""
    kind = pick(rng, ("dining chair", "lounge chair", "bar chair"), (6, 3, 2))
    back, base = pick(rng, BACKS), pick(rng, BASES, (4, 4, 2, 2, 1 if kind != "bar chair" else 0))
    seat_height = {"dining chair": 0.46, "lounge chair": 0.38, "bar chair": 0.68}[kind] * rng.uniform(0.93, 1.07)
    width = rng.uniform(0.44, 0.52) * (1.2 if kind == "lounge chair" else 0.92 if kind == "bar chair" else 1.0)
    depth = width * rng.uniform(0.92, 1.06)
    back_height = rng.uniform(0.42, 0.56) * (0.75 if kind == "bar chair" else 1.0)
    thick = 1.12 * THINNEST * (seat_height + back_height)
    has_arms, has_cushion = bool(rng.random() < 0.35) and kind != "bar chair", bool(rng.random() < 0.35)

    seat = box((width, thick, depth), (0, seat_height, 0))
    solids = [seat, _base(rng, base, width, depth, seat_height, thick)]
    solids.append(_back(rng, back, width, depth, seat_height, back_height, thick))
    extras = [f"a {back} back"]
    if has_arms:
        solids.append(_arms(rng, width, depth, seat_height, thick))
        extras.append("two arms")
    if has_cushion:
        pad = 1.3 * thick
        size = (width * 0.94, pad, depth * 0.9)
        solids.append(cushion(size, (0, seat_height + thick / 2 + pad * 0.4, depth * 0.03), radius=pad * 0.45))
        extras.append("a cushion")
    return finish(union(solids), f"{with_article(kind)} with {listed([*extras, base])}")


def _base(rng: np.random.Generator, base: str, width: float, depth: float, height: float, thick: float) -> Solid:
    x, z = width / 2 - thick / 2, depth / 2 - thick / 2
    if base in BASES[:2]:
        tapers = base == BASES[1]
        splay = rng.uniform(0.0, 0.06) if tapers else 0.0
        leg = thick * rng.uniform(1.0, 1.35)
        foot = max(leg * 0.72, 0.9 * thick) if tapers else leg
        make = rod if tapers and rng.random() < 0.6 else beam
        scale = 0.5 if make is rod else 1.0
        corners = [(i, k) for i in (-1, 1) for k in (-1, 1)]
        return union(
            make((i * (x - splay), height, k * (z - splay)), (i * (x + splay), foot / 2, k * (z + splay)), scale * leg,
                 **{"end_radius" if make is rod else "end_size": scale * foot})
            for i, k in corners
        )  # fmt: skip
    if base == BASES[2]:
        num_arms, radius = int(rng.choice([4, 5])), 0.48 * width
        angles = 2 * np.pi * (np.arange(num_arms) + 0.5) / num_arms
        feet = [(radius * np.sin(a), 0.55 * thick, radius * np.cos(a)) for a in angles]
        hub = (0.0, 1.1 * thick, 0.0)
        return union(
            [cylinder(0.7 * thick, height, at=(0, 0.3 * thick, 0)), *(rod(hub, f, 0.55 * thick) for f in feet)]
        )
    rocks = base == BASES[4]
    sides = []
    for i in (-1, 1):
        legs = [rod((i * x, height, k * z), (i * x, thick, k * z), 0.55 * thick) for k in (-0.9, 0.9)]
        if rocks:
            # A shallow circle through the feet, longer than the seat.
            reach, radius = 0.85 * depth, 2.2 * depth
            half = np.degrees(np.arcsin(reach / radius))
            runner = path(
                arc((i * x, radius + 0.55 * thick, 0), radius, -90 - half, -90 + half, plane="zy"), 0.55 * thick
            )
        else:
            runner = rod((i * x, 0.55 * thick, -z), (i * x, 0.55 * thick, z), 0.55 * thick)
        sides += [*legs, runner]
    return union(sides)


def _back(
    rng: np.random.Generator, back: str, width: float, depth: float, seat: float, height: float, thick: float
) -> Solid:
    lean = rng.uniform(0.0, 0.10)
    z = -depth / 2 + thick / 2
    top = seat + height

    def at(x: float, y: float) -> tuple[float, float, float]:
        """A point of the leaning plane of the back."""
        return (x, y, z - lean * (y - seat) / height * 1.2)

    x = width / 2 - thick / 2
    posts = [beam(at(i * x, seat), at(i * x, top), thick) for i in (-1, 1)]
    if back == "solid":
        low = seat + pick(rng, (0.0, 0.3 * height))
        return union([*posts, beam_wall([at(-x, low), at(x, low), at(-x, top), at(x, top)], thick)])
    if back == "slatted":
        num_slats = int(rng.integers(2, 5)) if width > 0.42 else 2
        slats = [beam(at(s, seat), at(s, top), thick * 0.95) for s in np.linspace(-x, x, num_slats + 2)[1:-1]]
        return union([*posts, *slats, beam(at(-x, top), at(x, top), thick * 1.2)])
    if back == "ladder":
        levels = np.linspace(0.34, 1.0, int(rng.integers(2, 5)))
        return union(
            [*posts, *(beam(at(-x, seat + f * height), at(x, seat + f * height), 1.1 * thick) for f in levels)]
        )
    middle = at(0.0, seat + 0.62 * height)
    radius = min(0.40 * height, 0.55 * width)
    disc = (
        cylinder(radius, thick, at=(0, -thick / 2, 0), segments=32)
        .rotate([90 - np.degrees(lean), 0, 0])
        .translate(list(middle))
    )
    stems = [beam(at(i * 0.5 * x, seat), at(i * 0.5 * x, seat + 0.5 * height), thick) for i in (-1, 1)]
    return union([disc, *stems])


def beam_wall(corners: list[tuple[float, float, float]], thick: float) -> Solid:
    """The hull of small boxes at some corners: a leaning wall."""
    from manifold3d import Manifold

    return Manifold.batch_hull([box((thick, thick, thick), c) for c in corners])


def _arms(rng: np.random.Generator, width: float, depth: float, seat: float, thick: float) -> Solid:
    rise = rng.uniform(0.17, 0.23)
    x = width / 2 - thick / 2
    parts = []
    for i in (-1, 1):
        parts.append(beam((i * x, seat + rise, -depth / 2 + thick), (i * x, seat + rise, depth * 0.36), thick * 1.1))
        parts.append(beam((i * x, seat, depth * 0.34), (i * x, seat + rise, depth * 0.34), thick))
    return union(parts)
