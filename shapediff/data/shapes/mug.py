"""Mugs: straight, tapered, barrel and tulip bodies, hollow, with four kinds of handles."""

from __future__ import annotations

import itertools

import numpy as np

from shapediff.data.shapes.parts import (
    THINNEST,
    Shape,
    Solid,
    arc,
    beam,
    cylinder,
    finish,
    path,
    pick,
    turned,
    union,
    with_article,
)

BODIES = ("straight", "tapered", "barrel", "tulip")
HANDLES = ("C-shaped", "D-shaped", "square", "ear-shaped")


def build(rng: np.random.Generator) -> Shape:
    """A mug, its handle at +x."""
    body, handle = pick(rng, BODIES), pick(rng, HANDLES)
    height = rng.uniform(0.085, 0.135)
    radius = height * rng.uniform(0.36, 0.5) if height > 0.1 else height * rng.uniform(0.42, 0.58)
    wall = 1.35 * THINNEST * max(height, 2.7 * radius)
    profile = _profile(body, radius, height)
    outer = turned(profile, segments=40)
    hollow = [(max(r - wall, 0.3 * radius), y) for r, y in profile]
    hollow = [
        (hollow[0][0], 1.1 * wall),
        *[(r, y) for r, y in hollow[1:-1] if y > 1.2 * wall],
        (hollow[-1][0], height * 1.05),
    ]
    inner = turned(hollow, segments=40)
    grip = _handle(rng, handle, radius, height, wall)
    # The handle must not reach through the wall.
    solid = (outer + grip) - inner
    extras = ""
    if rng.random() < 0.2:
        solid = solid + cylinder(radius * 1.45, wall, at=(0, -wall * 0.5, 0), top=radius * 1.55, segments=40)
        extras = " on a saucer"
    return finish(solid, f"{with_article(f'{body} mug')} with {with_article(f'{handle} handle')}{extras}")


def _profile(body: str, radius: float, height: float) -> list[tuple[float, float]]:
    steps = np.linspace(0, 1, 9)
    width = {
        "straight": np.ones(9),
        "tapered": 0.76 + 0.24 * steps,
        "barrel": 0.86 + 0.14 * np.sin(np.pi * steps),
        "tulip": 0.80 + 0.26 * steps**2 - 0.10 * np.sin(np.pi * steps),
    }[body]
    return [(float(radius * w), float(height * s)) for w, s in zip(width, steps, strict=True)]


def _handle(rng: np.random.Generator, handle: str, radius: float, height: float, wall: float) -> Solid:
    grip, middle = 0.58 * wall, height * rng.uniform(0.48, 0.56)
    x, half, reach = radius * 0.92, height * rng.uniform(0.27, 0.32), radius * rng.uniform(0.62, 0.8)
    if handle == "C-shaped":
        points = [
            [x + reach * np.cos(a), middle + half * np.sin(a), 0.0] for a in np.linspace(-np.pi / 2, np.pi / 2, 11)
        ]
        return path([[x * 0.9, middle - half, 0.0], *points, [x * 0.9, middle + half, 0.0]], grip)
    if handle == "D-shaped":
        bend = arc((x + reach * 0.3, middle, 0), half, -90, 90)
        return path([[x * 0.9, middle - half, 0.0], *bend, [x * 0.9, middle + half, 0.0]], grip)
    if handle == "square":
        corners = [
            (x * 0.9, middle - half, 0),
            (x + reach, middle - half, 0),
            (x + reach, middle + half, 0),
            (x * 0.9, middle + half, 0),
        ]
        return union(beam(a, b, 2 * grip) for a, b in itertools.pairwise(corners))
    low = (x * 0.85, middle - half, 0)
    return path(
        [
            (x * 0.9, middle + half, 0),
            (x + reach * 0.8, middle + half, 0),
            (x + reach, middle + half * 0.5, 0),
            (x + reach * 0.55, middle - half * 0.5, 0),
            low,
        ],
        grip,
    )
