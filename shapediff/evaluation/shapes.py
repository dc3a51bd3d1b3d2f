"""Sets of shapes to compare, and what is said of each shape alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64

from shapediff.evaluation.points import Grids


@dataclass(frozen=True)
class ShapeSet:
    """Shapes (n, R, R, R) bool, index order (x, y, z), each of a class.

    `closed` (n,) says whether each shape's own mesh was closed, where it came as a mesh; None where it came as voxels.
    """

    grids: Grids
    labels: Int64[np.ndarray, " n"]
    closed: Bool[np.ndarray, " n"] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def rows(self, rows: Int64[np.ndarray, " m"]) -> ShapeSet:
        """Some of the shapes."""
        return ShapeSet(self.grids[rows], self.labels[rows], None if self.closed is None else self.closed[rows])

    def of_class(self, label: int) -> ShapeSet:
        """Those of one class."""
        return self.rows(np.flatnonzero(self.labels == label))


def join(sets: Sequence[ShapeSet]) -> ShapeSet:
    """One set after the other."""
    closed = [s.closed for s in sets if s.closed is not None]
    return ShapeSet(
        np.concatenate([s.grids for s in sets]),
        np.concatenate([s.labels for s in sets]),
        np.concatenate(closed) if len(closed) == len(sets) else None,
    )


def draw(shapes: ShapeSet, num: int, *, seed: int) -> ShapeSet:
    """`num` of the shapes at random: fewer of them are the first of more."""
    return shapes.rows(np.random.default_rng(seed).permutation(len(shapes))[:num])


def num_parts(grids: Grids) -> Int64[np.ndarray, " n"]:
    """How many parts each shape has: sets of inside voxels that touch by faces."""
    from scipy.ndimage import label

    return np.array([label(grid)[1] for grid in grids], dtype=np.int64)


def is_closed(shapes: ShapeSet) -> Bool[np.ndarray, " n"]:
    """Whether the mesh of each shape is closed: its own where it came as one; that of voxels always is, unless it is empty."""
    return np.asarray(shapes.grids.any((1, 2, 3))) if shapes.closed is None else shapes.closed
