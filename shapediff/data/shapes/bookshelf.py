"""Bookshelves: straight, stepped, ladder and cube shelves, open or with a back, some with books."""

from __future__ import annotations

import itertools

import numpy as np

from shapediff.data.shapes.parts import THINNEST, Shape, Solid, beam, box, finish, listed, pick, union, with_article

KINDS = ("straight", "stepped", "ladder", "cube")


def build(rng: np.random.Generator) -> Shape:
    """A bookshelf, its opening at +z."""
    kind = pick(rng, KINDS, (5, 2, 2, 3))
    height = rng.uniform(0.9, 1.25) if kind == "cube" else rng.uniform(1.5, 2.0)
    width = rng.uniform(0.9, 1.25) if kind == "cube" else rng.uniform(0.7, 1.05)
    depth = rng.uniform(0.30, 0.40)
    thick = 1.08 * THINNEST * max(height, width)
    has_back, has_books = bool(rng.random() < 0.5), bool(rng.random() < 0.5)
    num_levels = int(rng.integers(2, 4)) if kind == "cube" else int(rng.integers(3, 6))
    levels = np.linspace(thick / 2, height - thick / 2, num_levels + 1)
    solids, extras = [], [f"{num_levels} levels"]
    if kind == "ladder":
        solids.append(_ladder(width, depth, height, levels, thick))
    elif kind == "stepped":
        solids.append(_stepped(width, depth, height, levels, thick))
    else:
        solids += [box((width, thick, depth), (0, y, 0)) for y in levels]
        num_posts = int(rng.integers(3, 5)) if kind == "cube" else 2
        posts = np.linspace(-(width - thick) / 2, (width - thick) / 2, num_posts)
        solids += [box((thick, height, depth), (x, height / 2, 0)) for x in posts]
        if has_books:
            solids += [
                _books(rng, posts, y + thick / 2, levels[1] - levels[0] - thick, depth, thick) for y in levels[:-1]
            ]
            extras.append("books")
    if has_back and kind in ("straight", "cube"):
        solids.append(box((width, height, thick), (0, height / 2, -depth / 2 + thick / 2)))
        extras.append("a back panel")
    return finish(union(solids), f"{with_article(f'{kind} bookshelf')} with {listed(extras)}")


def _books(rng: np.random.Generator, posts: np.ndarray, floor: float, room: float, depth: float, thick: float) -> Solid:
    """One row of books in one bay of a level, leaning against its left post."""
    bay = int(rng.integers(len(posts) - 1))
    left, right = posts[bay] + thick * 0.4, posts[bay + 1] - thick * 0.5
    length, height = (right - left) * rng.uniform(0.35, 0.8), room * rng.uniform(0.55, 0.8)
    steps = []
    for n, s in enumerate((1.0, rng.uniform(0.75, 1.0))):
        centre = (left + length * (0.26 + 0.48 * n), floor + height * s / 2 - 0.005, -depth * 0.08)
        steps.append(box((length * 0.52, height * s, depth * 0.8), centre))
    return union(steps)


def _ladder(width: float, depth: float, height: float, levels: np.ndarray, thick: float) -> Solid:
    x, back = (width - thick) / 2, -depth / 2
    reach = 1.4 * depth
    parts = []
    for i in (-1, 1):
        parts.append(beam((i * x, thick / 2, back), (i * x, height, back), thick))
        parts.append(beam((i * x, thick / 2, back + reach), (i * x, height, back + thick * 0.5), thick))
    for y in levels[:-1]:
        deep = reach * (1 - y / height) + thick
        parts.append(box((width, thick, deep), (0, y + thick, back + deep / 2 - thick / 2)))
    return union(parts)


def _stepped(width: float, depth: float, height: float, levels: np.ndarray, thick: float) -> Solid:
    """Each level narrower than the one below, flush on the left."""
    parts = []
    num_levels = len(levels) - 1
    for n, (low, high) in enumerate(itertools.pairwise(levels)):
        wide = width * (1 - 0.6 * n / num_levels)
        left = -width / 2
        parts += [box((wide, thick, depth), (left + wide / 2, y, 0)) for y in (low, high)]
        parts += [
            box((thick, high - low + thick, depth), (x, (low + high) / 2, 0))
            for x in (left + thick / 2, left + wide - thick / 2)
        ]
    return union(parts)
