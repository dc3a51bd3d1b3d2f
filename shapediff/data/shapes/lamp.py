"""Lamps: table, floor, arc, desk and lantern, with shades of five profiles."""

from __future__ import annotations

import numpy as np

from shapediff.data.shapes.parts import (
    THINNEST,
    Shape,
    Solid,
    arc,
    ball,
    beam,
    cylinder,
    finish,
    path,
    pick,
    rod,
    turned,
    union,
    with_article,
)  # fmt: skip

SHADES = ("drum", "cone", "dome", "globe", "bell")


def build(rng: np.random.Generator) -> Shape:
    """A lamp of one of five kinds."""
    kind = pick(rng, ("table lamp", "floor lamp", "arc lamp", "desk lamp", "tripod lamp"), (4, 3, 2, 2, 2))
    shade = pick(rng, SHADES)
    height = {"table lamp": 0.5, "floor lamp": 1.55, "arc lamp": 1.7, "desk lamp": 0.5, "tripod lamp": 1.35}[kind]
    height *= rng.uniform(0.9, 1.1)
    thick = 1.1 * THINNEST * height
    if kind == "table lamp":
        return finish(_table(rng, shade, height, thick), f"a table lamp with a {shade} shade")
    solid = {"floor lamp": _floor, "arc lamp": _arc, "desk lamp": _desk, "tripod lamp": _tripod}[kind](
        rng, shade, height, thick
    )
    return finish(solid, f"{with_article(kind)} with a {shade} shade")


def _shade(shade: str, radius: float, height: float, at: tuple[float, float, float]) -> Solid:
    """A solid shade whose bottom is at `at`."""
    profiles = {
        "drum": [(radius, 0), (radius * 0.94, height)],
        "cone": [(radius, 0), (radius * 0.42, height)],
        "bell": [(radius, 0), (radius * 0.72, height * 0.25), (radius * 0.52, height * 0.6), (radius * 0.40, height)],
        "dome": [(radius * np.cos(a), height * np.sin(a)) for a in np.linspace(0, np.pi / 2 * 0.94, 8)],
    }
    if shade == "globe":
        return ball(0.86 * radius, (at[0], at[1] + 0.8 * radius, at[2]))
    return turned(profiles[shade], at=at)


def _table(rng: np.random.Generator, shade: str, height: float, thick: float) -> Solid:
    radius, foot = height * rng.uniform(0.30, 0.40), height * rng.uniform(0.17, 0.24)
    tall = height * rng.uniform(0.36, 0.46)
    stem = height - tall * 0.9
    body = pick(rng, ("vase", "column", "ball", "cone"))
    profiles = {
        "vase": [
            (0.6 * foot, 0),
            (foot, 0.3 * stem),
            (0.8 * foot, 0.5 * stem),
            (0.6 * thick, 0.75 * stem),
            (0.6 * thick, stem),
        ],
        "column": [(foot, 0), (foot, 0.6 * thick), (0.65 * thick, thick), (0.65 * thick, stem)],
        "ball": [
            (0.5 * foot, 0),
            *[(foot * np.cos(a), 0.3 * stem * (1 + np.sin(a))) for a in np.linspace(-1, 1.2, 8)],
            (0.6 * thick, stem),
        ],
        "cone": [(foot, 0), (0.6 * thick, 0.85 * stem), (0.6 * thick, stem)],
    }
    return turned(profiles[body]) + _shade(shade, radius, tall, (0, stem * 0.97, 0))


def _floor(rng: np.random.Generator, shade: str, height: float, thick: float) -> Solid:
    radius, tall = height * rng.uniform(0.15, 0.19), height * rng.uniform(0.17, 0.24)
    foot = height * rng.uniform(0.12, 0.16)
    stem = cylinder(0.55 * thick, height - tall * 0.8, at=(0, 0, 0))
    return union(
        [cylinder(foot, thick, at=(0, 0, 0), top=foot * 0.9), stem, _shade(shade, radius, tall, (0, height - tall, 0))]
    )


def _tripod(rng: np.random.Generator, shade: str, height: float, thick: float) -> Solid:
    radius, tall = height * rng.uniform(0.17, 0.22), height * rng.uniform(0.2, 0.27)
    knot, reach = height - tall * 0.95, height * rng.uniform(0.2, 0.26)
    angles = 2 * np.pi * np.arange(3) / 3 + np.pi
    legs = [
        rod((0, knot, 0), (reach * np.sin(a), 0.5 * thick, reach * np.cos(a)), 0.58 * thick, end_radius=0.5 * thick)
        for a in angles
    ]
    return union([*legs, _shade(shade, radius, tall, (0, height - tall, 0))])


def _arc(rng: np.random.Generator, shade: str, height: float, thick: float) -> Solid:
    """A pole that bends over to one side."""
    radius, tall = height * rng.uniform(0.12, 0.15), height * rng.uniform(0.12, 0.16)
    bend = height * rng.uniform(0.26, 0.34)
    straight = height - bend
    foot = height * 0.16
    curve = arc((bend, straight, 0), bend, 180, 12)
    end = curve[-1]
    side = pick(rng, (-1, 1))
    solid = union([
        cylinder(foot, thick * 1.1, at=(0, 0, 0)),
        rod((0, 0.5 * thick, 0), (0, straight, 0), 0.55 * thick),
        path(curve, 0.55 * thick),
        _shade(shade, radius, tall, (end[0], end[1] - tall * 0.9, 0)),
    ])  # fmt: skip
    return solid if side > 0 else solid.mirror([1, 0, 0])


def _desk(rng: np.random.Generator, shade: str, height: float, thick: float) -> Solid:
    """Two arms with a joint, the head forward."""
    foot = height * rng.uniform(0.2, 0.26)
    elbow = (0.0, height * rng.uniform(0.5, 0.6), -height * rng.uniform(0.2, 0.3))
    head = (0.0, height * rng.uniform(0.82, 0.95), height * rng.uniform(0.22, 0.32))
    radius, tall = height * rng.uniform(0.17, 0.22), height * 0.24
    lamp = _shade(shade, radius, tall, (0, -tall * 0.8, 0)).rotate([-rng.uniform(10, 30), 0, 0]).translate(list(head))
    arms = [rod((0, thick * 0.5, 0), elbow, 0.55 * thick), rod(elbow, head, 0.52 * thick)]
    weight = beam((0, elbow[1], elbow[2]), (0, elbow[1], elbow[2]), 1.4 * thick)
    return union([cylinder(foot, thick * 1.1, at=(0, 0, 0)), *arms, weight, lamp])
