"""Cars: sedan, hatchback, pickup, van, suv and sports car; the front at +z."""

from __future__ import annotations

import numpy as np

from shapediff.data.shapes.parts import Shape, Solid, box, cylinder, finish, listed, pick, plate, union, with_article

KINDS = ("sedan", "hatchback", "pickup", "van", "suv", "sports car")

# Outlines of the side, (z, y) in parts of length and height, from the rear bumper up and over to the front.
OUTLINES = {
    "sedan": [
        (-0.5, 0.0),
        (-0.5, 0.52),
        (-0.34, 0.58),
        (-0.24, 0.98),
        (0.06, 1.0),
        (0.20, 0.58),
        (0.47, 0.48),
        (0.5, 0.0),
    ],
    "hatchback": [
        (-0.5, 0.0),
        (-0.5, 0.5),
        (-0.42, 0.95),
        (-0.3, 1.0),
        (0.06, 0.98),
        (0.24, 0.56),
        (0.48, 0.46),
        (0.5, 0.0),
    ],
    "van": [(-0.5, 0.0), (-0.5, 0.96), (-0.46, 1.0), (0.24, 1.0), (0.42, 0.5), (0.49, 0.42), (0.5, 0.0)],
    "suv": [(-0.5, 0.0), (-0.5, 0.55), (-0.46, 0.97), (0.05, 1.0), (0.19, 0.62), (0.48, 0.58), (0.5, 0.0)],
    "sports car": [
        (-0.5, 0.0),
        (-0.5, 0.62),
        (-0.3, 0.7),
        (-0.12, 1.0),
        (0.04, 0.98),
        (0.2, 0.55),
        (0.48, 0.32),
        (0.5, 0.0),
    ],
    "pickup": [
        (-0.5, 0.0),
        (-0.5, 0.50),
        (-0.06, 0.50),
        (-0.05, 0.98),
        (0.10, 1.0),
        (0.22, 0.56),
        (0.48, 0.5),
        (0.5, 0.0),
    ],
}


def build(rng: np.random.Generator) -> Shape:
    """A car on four wheels."""
    kind = pick(rng, KINDS)
    length = {"sedan": 4.6, "hatchback": 3.9, "pickup": 5.1, "van": 4.9, "suv": 4.6, "sports car": 4.3}[
        kind
    ] * rng.uniform(0.94, 1.06)
    width = rng.uniform(1.75, 1.95)
    radius = {"sports car": 0.36, "suv": 0.41, "pickup": 0.41}.get(kind, 0.34) * rng.uniform(0.95, 1.08)
    clear = radius * 0.75
    height = {"sedan": 1.12, "hatchback": 1.18, "pickup": 1.32, "van": 1.62, "suv": 1.36, "sports car": 0.92}[
        kind
    ] * rng.uniform(0.95, 1.05)

    outline = [(z * length, clear + y * height) for z, y in OUTLINES[kind]]
    body = plate(outline, width, normal="x")
    # The cabin narrows towards the roof: cut a wedge off each side above the belt.
    belt = clear + 0.56 * height
    lean = rng.uniform(0.10, 0.2)
    for i in (-1, 1):
        wedge = box((1.0, 3.0, 2 * length), (0.5, 1.5, 0)).rotate([0, 0, np.degrees(np.arctan(lean / (0.44 * height)))])
        wedge = wedge.translate([width / 2, belt, 0])
        body = body - (wedge if i > 0 else wedge.mirror([1, 0, 0]))
    extras = []
    if kind == "pickup":
        bed = box((width - 0.5, 0.5 * height, 0.36 * length), (0, clear + 0.5 * height, -0.27 * length))
        body = body - bed.translate([0, 0.12 * height, 0])
        extras.append("an open bed")
    solids = [body, *_wheels(length, width, radius, rng.uniform(0.29, 0.33))]
    if kind in ("van", "suv") and rng.random() < 0.4:
        rack = [
            box((0.24, 0.24, 0.42 * length), (i * 0.3 * width, clear + height + 0.06, -0.16 * length)) for i in (-1, 1)
        ]
        solids += rack
        extras.append("a roof rack")
    if kind == "sports car" and rng.random() < 0.6:
        spoiler = clear + 0.62 * height
        solids.append(box((width * 0.94, 0.22, 0.3), (0, spoiler + 0.3, -0.45 * length)))
        solids += [box((0.24, 0.4, 0.24), (i * 0.3 * width, spoiler + 0.12, -0.45 * length)) for i in (-1, 1)]
        extras.append("a spoiler")
    return finish(union(solids), with_article(kind) + (f" with {listed(extras)}" if extras else ""))


def _wheels(length: float, width: float, radius: float, place: float) -> list[Solid]:
    tyre = 0.34
    wheel = cylinder(radius, tyre, at=(0, -tyre / 2, 0)).rotate([0, 0, 90])
    return [
        wheel.translate([i * (width / 2 - tyre * 0.32), radius, k * place * length]) for i in (-1, 1) for k in (-1, 1)
    ]
