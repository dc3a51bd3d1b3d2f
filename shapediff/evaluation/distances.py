"""Distances between shapes, as matrices between two sets of them.

All are exact but the sliced Wasserstein distance, which is the labelled approximation of the earth mover's.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float64
from torch import Tensor

from shapediff.evaluation.pictures import PICTURE_SIZE, VIEWS, Pictures
from shapediff.evaluation.points import Grids, Points

Matrix = Float64[np.ndarray, "n m"]
Progress = Callable[[int], object]
"""Told of the pairs that are done since it was told last."""

NUM_PROJECTIONS = 64
EMD_POINTS = 512
"""Points for the earth mover's distance and its approximation, the first of each shape's: 15 ms a pair on one core for the exact
one, where 2,048 take 300 and more."""


@dataclass(frozen=True)
class Distance:
    """A distance by name: `measure(a, b, progress)` gives the (n, m) matrix; b None means a against itself.

    `of` tells what it is measured on: "points" (n, 3, p), "grids" (n, R, R, R) bool or "pictures" (n, v, s, s) uint8.
    """

    title: str
    of: str
    measure: Callable[[Any, Any, Progress | None], Matrix]


def chamfer(a: Points, b: Points | None = None, progress: Progress | None = None) -> Matrix:
    """CD(X, Y) = mean over x of min |x - y|^2 + mean over y of min |x - y|^2: squared, a sum of two means.

    As in PointFlow (Yang et al. 2019, eq. 8, which sums where its code takes means). Exact.
    """
    from shapediff.evaluation.kernels import chamfer_rows

    def row(i: int, others: Points) -> np.ndarray:
        out = np.empty((1, len(others)))
        chamfer_rows(np.ascontiguousarray(a[i : i + 1]), others, False, out)
        return out[0]

    return _by_rows(row, a, b, progress)


def earth_mover(a: Points, b: Points | None = None, progress: Progress | None = None) -> Matrix:
    """EMD(X, Y) = min over bijections phi of mean |x - phi(x)|, not squared, on EMD_POINTS points of each.

    The assignment is exact (Jonker and Volgenant, in SciPy), where most published figures are of approximations.
    """
    from scipy.optimize import linear_sum_assignment
    from scipy.spatial.distance import cdist

    def row(i: int, others: Points) -> np.ndarray:
        costs = (cdist(a[i, :, :EMD_POINTS].T, other[:, :EMD_POINTS].T) for other in others)
        return np.array([cost[linear_sum_assignment(cost)].mean() for cost in costs])

    return _by_rows(row, a, b, progress)


def sliced_wasserstein(a: Points, b: Points | None = None, progress: Progress | None = None) -> Matrix:
    """The sliced 2-Wasserstein distance (Bonneel et al. 2015, eq. 4) over NUM_PROJECTIONS fixed directions.

    SW^2 is the mean over directions of the squared distance between sorted projections; at most W_2^2 / 3 for evenly spread
    directions. On EMD_POINTS points: an approximation of the earth mover's distance at the cost of a matrix product.
    """
    one = torch.from_numpy(_sorted_projections(a))
    other = one if b is None else torch.from_numpy(_sorted_projections(b))
    # In float64 what |x|^2 + |y|^2 - 2xy loses is 1e-8 of the points' spread.
    matrix = torch.cdist(one, other, compute_mode="use_mm_for_euclid_dist").numpy()
    if b is None:
        matrix = np.triu(matrix, 1) + np.triu(matrix, 1).T
    if progress is not None:
        progress(_num_pairs(a, b))
    return matrix


def iou_distance(a: Grids, b: Grids | None = None, progress: Progress | None = None) -> Matrix:
    """1 - |X and Y| / |X or Y| of the voxels inside; 0 between two empty grids. Exact: float32 holds the counts."""
    one = torch.from_numpy(a.reshape(len(a), -1))
    other = one if b is None else torch.from_numpy(b.reshape(len(b), -1))
    shared = torch.cat([_shared(block, other) for block in one.split(256)]) if len(a) else torch.zeros(0, len(other))
    union = one.sum(1)[:, None] + other.sum(1)[None] - shared.long()
    if progress is not None:
        progress(_num_pairs(a, b))
    return (1 - shared.double() / union.clamp(min=1)).masked_fill(union == 0, 0.0).numpy()


def _shared(block: Bool[Tensor, "n v"], others: Bool[Tensor, "m v"]) -> Tensor:
    rows = block.float()
    return torch.cat([rows @ part.float().T for part in others.split(1024)], 1)


def shading_distance(a: Pictures, b: Pictures | None = None, progress: Progress | None = None) -> Matrix:
    """(mean over views and pixels of (A - B)^2)^(1/2), of the brightness in [0, 1] of shaded pictures. Exact.

    The views are fixed, and neither aligned nor described by features, as those of light fields are (Chen et al. 2003).
    """
    one = a.reshape(len(a), -1)
    other = None if b is None else b.reshape(len(b), -1)
    if progress is not None:
        progress(_num_pairs(a, b))
    return euclidean(one, other) / (255 * np.sqrt(one.shape[1]))


def euclidean(a: np.ndarray, b: np.ndarray | None = None) -> Matrix:
    """|x - y| between rows of features, float64."""
    from scipy.spatial.distance import cdist

    one = np.asarray(a, np.float64)
    return cdist(one, one if b is None else np.asarray(b, np.float64))


DISTANCES: dict[str, Distance] = {
    "cd": Distance("Chamfer distance, squared, mean + mean, exact", "points", chamfer),
    "emd": Distance(f"earth mover's distance, exact assignment of {EMD_POINTS} points", "points", earth_mover),
    "swd": Distance(
        f"sliced Wasserstein distance, {NUM_PROJECTIONS} directions: approximates EMD", "points", sliced_wasserstein
    ),
    "iou": Distance("1 - IoU of the voxels, exact", "grids", iou_distance),
    "shade": Distance(
        f"RMS difference of shaded pictures, {len(VIEWS)} fixed views of {PICTURE_SIZE}^2", "pictures", shading_distance
    ),
}


def _by_rows(row: Callable[[int, Any], np.ndarray], a: Points, b: Points | None, progress: Progress | None) -> Matrix:
    """Row by row; of a set against itself only what is right of the diagonal, mirrored."""
    others = a if b is None else b
    matrix = np.zeros((len(a), len(others)))
    for i in range(len(a)):
        start = i + 1 if b is None else 0
        matrix[i, start:] = row(i, others[start:])
        if progress is not None:
            progress(len(others) - start)
    return matrix + matrix.T if b is None else matrix


def _sorted_projections(points: Points) -> np.ndarray:
    """(n, directions * p) float64, scaled so that the squared Euclidean distance of rows is SW^2."""
    directions = _directions()
    projected = np.sort(np.einsum("dk,nkp->ndp", directions, points[..., :EMD_POINTS].astype(np.float64)), axis=-1)
    return projected.reshape(len(points), -1) / np.sqrt(projected[0].size if len(points) else 1)


def _directions() -> Float64[np.ndarray, "d 3"]:
    """Even over the half sphere: the Fibonacci lattice (Swinbank and Purser 2006)."""
    i = np.arange(NUM_PROJECTIONS) + 0.5
    height, turn = i / NUM_PROJECTIONS, np.pi * (1 + np.sqrt(5)) * i
    ring = np.sqrt(1 - height**2)
    return np.stack([ring * np.cos(turn), ring * np.sin(turn), height], 1)


def _num_pairs(a: Any, b: Any) -> int:
    return len(a) * (len(a) - 1) // 2 if b is None else len(a) * len(b)
