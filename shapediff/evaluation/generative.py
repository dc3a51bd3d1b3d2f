"""Metrics between a set of real shapes and a set of generated ones, from the distances between them.

Throughout: rr (n, n) real to real, gg (m, m) generated to generated, rg (n, m) real (rows) to generated (columns).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Float64

from shapediff.evaluation.distances import Matrix

JSD_CELLS = 28
NUM_NEIGHBOURS = 3
"""k of precision and recall: 3, as in Kynkäänniemi et al. 2019."""


def nearest_neighbour_accuracy(rr: Matrix, gg: Matrix, rg: Matrix) -> float:
    """1-NNA (Lopez-Paz and Oquab 2017; Yang et al. 2019, eq. 6): the share of all shapes whose nearest other is of their set.

    0.5 where the sets cannot be told apart, 1 where they can, below 0.5 where the generated ones copy the real ones. A shape
    as near to the other set as to its own counts half.
    """
    real = _votes(_without_self(rr).min(1), rg.min(1))
    generated = _votes(_without_self(gg).min(1), rg.min(0))
    return float(np.concatenate([real, generated]).mean())


def coverage(rg: Matrix) -> float:
    """COV (Achlioptas et al. 2018): the share of real shapes that are the nearest real one of some generated shape."""
    return len(np.unique(rg.argmin(0))) / len(rg)


def minimum_matching_distance(rg: Matrix) -> float:
    """MMD (Achlioptas et al. 2018): the mean over real shapes of the distance to the nearest generated one."""
    return float(rg.min(1).mean())


@dataclass(frozen=True)
class PrecisionRecall:
    """Both in [0, 1]: the share of generated shapes that look real, and the share of real ones that could be generated."""

    precision: float
    recall: float


def precision_recall(rr: Matrix, gg: Matrix, rg: Matrix, *, num_neighbours: int = NUM_NEIGHBOURS) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al. 2019, eq. 1 and 2).

    A shape counts if it lies in the ball of at least one shape of the other set that reaches that one's k-th neighbour.
    """
    real_radius, generated_radius = _radii(rr, num_neighbours), _radii(gg, num_neighbours)
    return PrecisionRecall(
        precision=float((rg <= real_radius[:, None]).any(0).mean()),
        recall=float((rg <= generated_radius[None]).any(1).mean()),
    )


def novelty(real_to_train: Float[np.ndarray, " n"], generated_to_train: Float[np.ndarray, " m"]) -> float:
    """The chance that a generated shape is farther from its nearest training shape than a held-out real one is; ties half.

    0.5 for shapes as new as held-out ones, 0 for copies of the training set: the Mann-Whitney statistic of the data-copying
    test of Meehan et al. 2020, sec. 3.
    """
    order = np.sort(real_to_train)
    below = np.searchsorted(order, generated_to_train, "left") + np.searchsorted(order, generated_to_train, "right")
    return float(below.mean() / (2 * len(order)))


def diversity(gg: Matrix) -> float:
    """The mean distance between two different shapes of a set."""
    return float(gg.sum() / (len(gg) * (len(gg) - 1)))


def point_histograms(points: Float[np.ndarray, "n 3 p"]) -> Float64[np.ndarray, "n cells"]:
    """How the points of each shape lie in JSD_CELLS^3 cells of the unit cube, each row summing to 1."""
    cells = np.clip(((points + 0.5) * JSD_CELLS).astype(np.int64), 0, JSD_CELLS - 1)
    flat = (cells[:, 0] * JSD_CELLS + cells[:, 1]) * JSD_CELLS + cells[:, 2]
    return np.stack([np.bincount(row, minlength=JSD_CELLS**3) for row in flat]) / points.shape[-1]


def jensen_shannon(p: Float[np.ndarray, " cells"], q: Float[np.ndarray, " cells"]) -> float:
    """JSD (Achlioptas et al. 2018) in bits, in [0, 1]: of the mean histograms of two sets.

    It sees where points lie on average, and nothing of single shapes.
    """
    middle = (p + q) / 2
    return (_relative_entropy(p, middle) + _relative_entropy(q, middle)) / 2


def _relative_entropy(p: np.ndarray, q: np.ndarray) -> float:
    seen = p > 0
    return float((p[seen] * np.log2(p[seen] / q[seen])).sum())


def _votes(own: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (own < other) + 0.5 * (own == other)


def _without_self(matrix: Matrix) -> Matrix:
    return matrix + np.diag(np.full(len(matrix), np.inf))


def _radii(matrix: Matrix, num_neighbours: int) -> np.ndarray:
    """The distance of each shape from its k-th nearest other of the set; the last one's where there are fewer."""
    k = min(num_neighbours, len(matrix) - 1)
    return np.partition(_without_self(matrix), k - 1, axis=1)[:, k - 1]
