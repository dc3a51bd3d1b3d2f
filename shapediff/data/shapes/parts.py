"""The parts that procedural shapes are put together from: solids of manifold3d, lengths in metres, y up, front at +z.

Nothing structural is thinner than `THINNEST` of the longest side of its shape, so that 32^3 voxels show it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, TypeVar

import numpy as np
from manifold3d import CrossSection, Manifold, OpType

if TYPE_CHECKING:
    import trimesh

Solid: TypeAlias = Manifold
Point = Sequence[float]
Choice = TypeVar("Choice")

THINNEST = 0.048
SEGMENTS = 24


@dataclass(frozen=True)
class Shape:
    """A procedural shape: a closed mesh in metres, y up, facing +z, standing on y = 0, and what it is in words."""

    mesh: trimesh.Trimesh
    caption: str


def box(size: Point, centre: Point) -> Solid:
    """An axis-aligned box."""
    return Manifold.cube(list(size), True).translate(list(centre))


def slab(width: float, height: float, depth: float, *, at: Point) -> Solid:
    """A box standing with the middle of its bottom face at `at`."""
    x, y, z = at
    return box((width, height, depth), (x, y + height / 2, z))


def cushion(size: Point, centre: Point, *, radius: float) -> Solid:
    """A box with edges rounded by `radius`."""
    radius = min(radius, 0.49 * min(size))
    offsets = np.array(size) / 2 - radius
    ball = Manifold.sphere(radius, 12)
    corners = [
        ball.translate((np.array(centre) + offsets * (i, j, k)).tolist())
        for i in (-1, 1)
        for j in (-1, 1)
        for k in (-1, 1)
    ]
    return Manifold.batch_hull(corners)


def cylinder(radius: float, height: float, *, at: Point, top: float | None = None, segments: int = SEGMENTS) -> Solid:
    """An upright cylinder, or a cone frustum of another `top` radius, with the middle of its bottom face at `at`."""
    upright = Manifold.cylinder(height, radius, radius if top is None else top, segments).rotate([-90, 0, 0])
    return upright.translate(list(at))


def ball(radius: float, centre: Point, *, scale: Point = (1, 1, 1)) -> Solid:
    """An ellipsoid."""
    return Manifold.sphere(radius, SEGMENTS).scale(list(scale)).translate(list(centre))


def rod(start: Point, end: Point, radius: float, *, end_radius: float | None = None) -> Solid:
    """A round rod with round ends between two points, tapering if `end_radius` differs."""
    ends = [(start, radius), (end, radius if end_radius is None else end_radius)]
    return Manifold.batch_hull([Manifold.sphere(r, 12).translate(list(p)) for p, r in ends])


def beam(start: Point, end: Point, size: float, *, end_size: float | None = None) -> Solid:
    """A square beam between two points, its ends axis-aligned."""
    ends = [(start, size), (end, size if end_size is None else end_size)]
    return Manifold.batch_hull([box((s, s, s), p) for p, s in ends])


def path(points: Sequence[Point], radius: float) -> Solid:
    """A round rod along a polyline."""
    return union(rod(a, b, radius) for a, b in itertools.pairwise(points))


def arc(
    centre: Point, radius: float, start: float, end: float, *, plane: str = "xy", steps: int = 10
) -> list[list[float]]:
    """Points of a circle's arc, angles in degrees, in plane "xy" or "zy" (the first axis is where the angle is 0)."""
    angles = np.radians(np.linspace(start, end, steps + 1))
    u, v = radius * np.cos(angles), radius * np.sin(angles)
    x, y, z = centre
    return [
        [x + a, y + b, z] if plane == "xy" else [x, y + b, z + a] for a, b in zip(u.tolist(), v.tolist(), strict=True)
    ]


def turned(profile: Sequence[tuple[float, float]], *, at: Point = (0, 0, 0), segments: int = 32) -> Solid:
    """A solid of revolution about the y axis: `profile` is (radius, height) from the bottom axis point to the top one."""
    outline = [(0.0, profile[0][1]), *profile, (0.0, profile[-1][1])]
    return (
        Manifold.revolve(CrossSection([_counter_clockwise(outline)]), segments).rotate([-90, 0, 0]).translate(list(at))
    )


def plate(outline: Sequence[tuple[float, float]], thickness: float, *, normal: str, at: Point = (0, 0, 0)) -> Solid:
    """A flat polygon of some thickness, its middle plane through `at`.

    `normal` "x": the outline is (z, y); "y": (x, z); "z": (x, y).
    """
    flat = Manifold.extrude(CrossSection([_counter_clockwise(outline)]), thickness).translate([0, 0, -thickness / 2])
    if normal == "x":
        flat = flat.rotate([0, 90, 0]).mirror([0, 0, 1])
    elif normal == "y":
        flat = flat.rotate([90, 0, 0])
    return flat.translate(list(at))


def union(solids: Iterable[Solid]) -> Solid:
    """All of them as one solid."""
    return Manifold.batch_boolean(list(solids), OpType.Add)


def mirrored(solid: Solid) -> Solid:
    """The solid and its mirror image in x."""
    return solid + solid.mirror([1, 0, 0])


def pick(rng: np.random.Generator, options: Sequence[Choice], weights: Sequence[float] | None = None) -> Choice:
    """One of the options."""
    p = None if weights is None else np.array(weights) / np.sum(weights)
    return options[int(rng.choice(len(options), p=p))]


def finish(solid: Solid, caption: str) -> Shape:
    """The shape standing on y = 0 about the y axis."""
    import trimesh

    mesh = solid.to_mesh()
    vertices = np.asarray(mesh.vert_properties, np.float64)[:, :3]
    low, high = vertices.min(0), vertices.max(0)
    vertices = vertices - [(low[0] + high[0]) / 2, low[1], (low[2] + high[2]) / 2]
    return Shape(trimesh.Trimesh(vertices, np.asarray(mesh.tri_verts, np.int64), process=False), caption)


def with_article(words: str) -> str:
    """ "a chair", "an open shelf"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def listed(items: Sequence[str]) -> str:
    """ "arms, a cushion and four legs"."""
    return items[0] if len(items) == 1 else f"{', '.join(items[:-1])} and {items[-1]}"


def _counter_clockwise(outline: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    points = np.array(outline)
    after = np.roll(points, -1, 0)
    area = (points[:, 0] * after[:, 1] - after[:, 0] * points[:, 1]).sum()
    return [tuple(p) for p in (points if area > 0 else points[::-1]).tolist()]
