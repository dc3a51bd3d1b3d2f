"""Airplanes: airliners, propeller planes, gliders, fighters and biplanes; nose at +z."""

from __future__ import annotations

import numpy as np

from shapediff.data.shapes.parts import (
    THINNEST,
    Shape,
    Solid,
    ball,
    box,
    cylinder,
    finish,
    listed,
    mirrored,
    pick,
    plate,
    rod,
    turned,
    union,
    with_article,
)  # fmt: skip

KINDS = ("airliner", "propeller plane", "glider", "jet fighter", "biplane")
TAILS = ("conventional tail", "T-tail", "V-tail")


def build(rng: np.random.Generator) -> Shape:
    """An airplane in level flight."""
    kind = pick(rng, KINDS, (5, 3, 2, 3, 1))
    length = {"airliner": 38.0, "propeller plane": 8.5, "glider": 8.0, "jet fighter": 15.0, "biplane": 7.0}[
        kind
    ] * rng.uniform(0.9, 1.1)
    span = (
        length
        * {"airliner": 0.95, "propeller plane": 1.15, "glider": 1.7, "jet fighter": 0.68, "biplane": 1.1}[kind]
        * rng.uniform(0.92, 1.08)
    )
    thick = 1.08 * THINNEST * max(length, span)
    girth = max(
        length * {"airliner": 0.055, "jet fighter": 0.06}.get(kind, 0.062) * rng.uniform(0.92, 1.12), 0.75 * thick
    )
    tail = pick(rng, TAILS, (3, 2, 1)) if kind != "biplane" else TAILS[0]
    wing_y = pick(rng, (-0.55, 0.0, 0.7)) * girth
    sweep = {"airliner": rng.uniform(0.35, 0.6), "jet fighter": rng.uniform(0.7, 1.0)}.get(kind, rng.uniform(0.0, 0.08))
    chord = length * {"airliner": 0.20, "jet fighter": 0.38, "glider": 0.14}.get(kind, 0.2) * rng.uniform(0.9, 1.1)
    chord = max(chord, 1.6 * thick)

    wing = _wing(span, chord, sweep, thick, y=wing_y, z=0.06 * length)
    solids = [_fuselage(length, girth, kind), wing, _tail(rng, tail, length, girth, thick)]
    extras = ["swept wings" if sweep > 0.2 else "straight wings", f"a {tail}"]
    if kind == "biplane":
        solids.append(_wing(span, chord, sweep, thick, y=wing_y + 0.2 * length, z=0.06 * length))
        solids += [
            box((thick, 0.2 * length, thick), (i * 0.3 * span, wing_y + 0.1 * length, 0.06 * length)) for i in (-1, 1)
        ]
        solids.append(box((thick, 0.2 * length, thick), (0, wing_y + 0.1 * length, 0.06 * length)))
    if kind in ("propeller plane", "biplane"):
        blade = 0.17 * length
        turn = rng.uniform(0, 180)
        solids.append(
            box((thick * 1.2, 2 * blade, thick), (0, 0, 0))
            .rotate([0, 0, turn])
            .translate([0, 0, length / 2 - 0.2 * thick])
        )
        extras.append("a propeller")
    if kind == "airliner":
        num = int(pick(rng, (2, 4), (3, 1)))
        solids += _engines(num, span, sweep, chord, girth, thick, wing_y, length)
        extras.append(f"{'two' if num == 2 else 'four'} engines")
    if kind == "jet fighter":
        solids.append(ball(girth, (0, 0.7 * girth, 0.18 * length), scale=(0.7, 0.75, 2.2)))
        extras.append("a canopy")
    return finish(union(solids), f"{with_article(kind)} with {listed(extras)}")


def _fuselage(length: float, girth: float, kind: str) -> Solid:
    nose = 1.6 if kind == "jet fighter" else 0.8
    s = np.array([0.0, 0.04, 0.12, 0.3, 0.6, 0.8, 0.92, 1.0])
    width = (
        np.array([0.42, 0.5, 0.68, 1.0, 1.0, 0.98, 0.7, 0.18])
        if nose < 1
        else np.array([0.7, 0.8, 0.9, 1.0, 0.95, 0.7, 0.4, 0.12])
    )
    return (
        turned([(float(girth * w), float(length * t)) for w, t in zip(width, s, strict=True)])
        .rotate([90, 0, 0])
        .translate([0, 0, -length / 2])
    )


def _wing(span: float, chord: float, sweep: float, thick: float, *, y: float, z: float) -> Solid:
    """Both halves: `sweep` is how far the tip lies back, in half spans."""
    half, tip = span / 2, max(0.45 * chord, 1.15 * thick)
    back = sweep * half
    outline = [
        (-0.01 * span, z + chord / 2),
        (half, z + chord / 2 - back),
        (half, z + chord / 2 - back - tip),
        (-0.01 * span, z - chord / 2),
    ]
    return mirrored(plate(outline, thick, normal="y", at=(0, y, 0)))


def _tail(rng: np.random.Generator, tail: str, length: float, girth: float, thick: float) -> Solid:
    root, z, rise = 0.15 * length, -0.41 * length, 0.17 * length * rng.uniform(0.9, 1.15)
    fin = [(z + root / 2, 0.0), (z - 0.2 * root, girth + rise), (z - 0.8 * root, girth + rise), (z - root / 2, 0.0)]
    spread = 0.36 * length
    if tail == "V-tail":
        half = plate(
            [
                (z + root / 2, 0.0),
                (z - 0.1 * root, 1.25 * rise + girth),
                (z - 0.7 * root, 1.25 * rise + girth),
                (z - root / 2, 0.0),
            ],
            thick,
            normal="x",
        )
        return mirrored(half.rotate([0, 0, -42]))
    y = girth + rise - thick / 2 if tail == "T-tail" else 0.15 * girth
    shift = -0.5 * root if tail == "T-tail" else 0.0
    return plate(fin, thick, normal="x") + _wing(spread, 0.8 * root, 0.35, thick, y=y, z=z + shift)


def _engines(
    num: int, span: float, sweep: float, chord: float, girth: float, thick: float, wing_y: float, length: float
) -> list[Solid]:
    radius, engines = max(0.62 * girth, 0.6 * thick), []
    for place in (0.3,) if num == 2 else (0.26, 0.55):
        x = place * span / 2
        z = 0.06 * length + chord * 0.5 - sweep * x
        pod = cylinder(radius, 0.34 * chord + radius, at=(0, -0.5 * chord * 0.3, 0), top=0.9 * radius).rotate(
            [90, 0, 0]
        )
        engines += [pod.translate([i * x, wing_y - radius - 0.2 * thick, z]) for i in (-1, 1)]
        engines += [rod((i * x, wing_y, z - 0.1 * chord), (i * x, wing_y - radius, z), 0.5 * thick) for i in (-1, 1)]
    return engines
