"""Sofas: two to three seats, straight or with a corner, on feet or a plinth."""

from __future__ import annotations

import numpy as np

from shapediff.data.shapes.parts import Shape, Solid, box, cushion, cylinder, finish, listed, pick, union, with_article

ARMS = ("boxy", "rounded", "low", "no")
NUMBERS = {1: "one", 2: "two", 3: "three"}


def build(rng: np.random.Generator) -> Shape:
    """A sofa with its cushions, sometimes with a chaise on one side."""
    seats = int(pick(rng, (1, 2, 3), (1, 3, 3)))
    arms, on_feet = pick(rng, ARMS, (3, 3, 2, 1)), bool(rng.random() < 0.6)
    has_chaise = bool(seats == 3 and rng.random() < 0.4)
    seat_width = rng.uniform(0.58, 0.70)
    arm = 0.0 if arms == "no" else rng.uniform(0.14, 0.24)
    inner, depth = seats * seat_width, rng.uniform(0.82, 0.98)
    width = inner + 2 * arm
    lift = 0.10 if on_feet else 0.0
    seat_height, back_height = rng.uniform(0.36, 0.44), rng.uniform(0.72, 0.90)
    arm_height = {"boxy": 0.60, "rounded": 0.62, "low": 0.50, "no": 0.0}[arms] * rng.uniform(0.95, 1.05)
    back = rng.uniform(0.18, 0.26)

    base = seat_height - 0.14 - lift
    solids = [box((width, base, depth), (0, lift + base / 2, 0))]
    lean = cushion((width if arms in ("low", "no") else inner + 0.02, back_height - lift, back),
                   (0, (back_height + lift) / 2, -depth / 2 + back / 2), radius=0.06)  # fmt: skip
    solids.append(lean)
    for s in range(seats):
        x = -inner / 2 + (s + 0.5) * seat_width
        size = (seat_width * 0.985, 0.19, depth - back * 0.8)
        solids.append(cushion(size, (x, seat_height - 0.06, back * 0.4), radius=0.05))
    solids += [_arm(arms, i * (width - arm) / 2, arm, arm_height, lift, depth) for i in (-1, 1) if arm]
    extras = [f"{arms} arms"]
    if has_chaise:
        side = pick(rng, (-1, 1))
        x = side * (inner - seat_width) / 2
        length = rng.uniform(0.55, 0.75)
        solids.append(box((seat_width, base, length), (x, lift + base / 2, depth / 2 + length / 2)))
        solids.append(
            cushion(
                (seat_width * 0.985, 0.19, length + 0.1),
                (x, seat_height - 0.06, depth / 2 + length / 2 - 0.03),
                radius=0.05,
            )
        )
        extras.append("a chaise")
    if on_feet:
        radius = 0.05 * max(1.0, width / 2)
        solids += [
            cylinder(radius * 0.8, lift + 0.02, at=(i * (width / 2 - 0.10), 0, k * (depth / 2 - 0.10)), top=radius)
            for i in (-1, 1)
            for k in (-1, 1)
        ]
        extras.append("short feet")
    return finish(
        union(solids),
        f"{with_article(f'{NUMBERS[seats]}-seat sofa' if seats > 1 else 'armchair')} with {listed(extras)}",
    )


def _arm(arms: str, x: float, arm: float, height: float, lift: float, depth: float) -> Solid:
    size, centre = (arm, height - lift, depth), (x, (height + lift) / 2, 0)
    if arms == "rounded":
        roll = (
            cylinder(arm * 0.62, depth, at=(0, -depth / 2, 0)).rotate([90, 0, 0]).translate([x, height - arm * 0.3, 0])
        )
        return box((arm * 0.9, height - lift - arm * 0.3, depth), (x, (height + lift - arm * 0.3) / 2, 0)) + roll
    return cushion(size, centre, radius=0.035)
