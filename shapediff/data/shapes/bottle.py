"""Bottles: wine, soda, flask, jug and vial, by revolving a profile; square ones by extrusion."""

from __future__ import annotations

import numpy as np

from shapediff.data.shapes.parts import THINNEST, Shape, arc, box, cylinder, finish, path, pick, turned, with_article

KINDS = ("wine bottle", "milk bottle", "soda bottle", "flask", "jug", "square bottle", "spray bottle")


def build(rng: np.random.Generator) -> Shape:
    """A bottle, solid, with or without a cap."""
    kind = pick(rng, KINDS)
    height = rng.uniform(0.20, 0.32)
    radius = height * {"wine bottle": 0.15, "milk bottle": 0.22, "soda bottle": 0.16, "flask": 0.32, "jug": 0.30}.get(
        kind, 0.2
    )
    radius *= rng.uniform(0.9, 1.15)
    neck = max(radius * rng.uniform(0.32, 0.42), 0.75 * THINNEST * height)
    shoulder = rng.uniform(0.52, 0.66)
    has_cap = bool(rng.random() < 0.5)
    if kind in ("square bottle", "spray bottle"):
        body = box((2 * radius, height * 0.62, 1.5 * radius), (0, height * 0.31, 0))
        solid = body + turned([(radius * 0.74, height * 0.60), (neck, height * 0.72), (neck, height)])
    else:
        solid = turned(_profile(kind, radius, neck, height, shoulder), segments=40)
    if kind == "spray bottle":
        head = box((neck * 2.2, height * 0.13, radius * 1.9), (0, height * 0.93, radius * 0.35))
        trigger = box((neck * 1.4, height * 0.16, neck * 1.2), (0, height * 0.83, radius * 0.95))
        return finish(solid + head + trigger, "a spray bottle with a trigger")
    if kind == "jug":
        grip = 0.55 * THINNEST * height * 1.25
        handle = path([[neck * 0.8, height * 0.86, 0], *arc((neck, height * 0.66, 0), height * 0.2, 90, -50)], grip)
        solid = solid + handle
    if has_cap:
        solid = solid + cylinder(neck * 1.22, height * 0.09, at=(0, height * 0.93, 0))
    return finish(solid, f"{with_article(kind)} {'with' if has_cap else 'without'} a cap")


def _profile(kind: str, radius: float, neck: float, height: float, shoulder: float) -> list[tuple[float, float]]:
    if kind == "flask":  # a ball below a neck
        angles = np.linspace(-1.25, 1.2, 12)
        ball = [(float(radius * np.cos(a)), float(radius * (np.sin(a) + 0.95))) for a in angles]
        return [*ball, (neck, 2.0 * radius), (neck, height)]
    if kind == "soda bottle":
        return [(radius * 0.9, 0), (radius, 0.05 * height), (radius, 0.25 * height),
                (radius * 0.82, 0.38 * height), (radius, 0.5 * height),
                (radius * 0.95, 0.62 * height), (neck, 0.84 * height), (neck, height)]  # fmt: skip
    if kind == "jug":
        return [
            (radius * 0.72, 0),
            (radius, 0.28 * height),
            (radius * 0.92, 0.5 * height),
            (neck, 0.74 * height),
            (neck * 1.05, height),
        ]
    ease = [
        (neck + (radius - neck) * np.cos(a) ** 2, height * (shoulder + 0.17 * a)) for a in np.linspace(0, np.pi / 2, 6)
    ]
    return [(radius * 0.95, 0), (radius, 0.03 * height), *[(float(r), float(y)) for r, y in ease], (neck, height)]
