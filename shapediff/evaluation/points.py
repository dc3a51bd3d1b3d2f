"""Grids -> points on their surfaces, the same way for every set that is compared."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Bool, Float32

from shapediff.geometry.isosurface import voxels_to_mesh

if TYPE_CHECKING:
    import trimesh

Grids = Bool[np.ndarray, "n r r r"]
Points = Float32[np.ndarray, "n 3 p"]

NUM_POINTS = 2048
"""Points a shape, as in PointFlow (Yang et al. 2019) and what followed it."""


def surface(grid: Bool[np.ndarray, "r r r"]) -> trimesh.Trimesh:
    """The marching cubes of a grid that is not empty, unsmoothed, in unit-cube coordinates: pinned here, whatever exports do."""
    return voxels_to_mesh(grid, smooth=0)


def surface_points(grids: Grids, *, num_points: int = NUM_POINTS) -> Points:
    """Points (n, 3, num_points), uniform by area on the surface of each grid, in unit-cube coordinates.

    The draw is seeded by the grid itself, so that the points of a shape never depend on what else is measured. All points of
    an empty grid lie at the origin, where no surface of a solid shape is.
    """
    return np.stack([_points_of(grid, num_points) for grid in grids]) if len(grids) else _no_points(num_points)


def _points_of(grid: Bool[np.ndarray, "r r r"], num_points: int) -> Float32[np.ndarray, "3 p"]:
    if not grid.any():
        return np.zeros((3, num_points), np.float32)
    mesh = surface(grid)
    draw = np.random.default_rng(_seed(grid))
    corners = np.asarray(mesh.vertices)[mesh.faces]
    area = np.cumsum(mesh.area_faces)
    corners = corners[np.searchsorted(area, draw.random(num_points) * area[-1], side="right").clip(max=len(area) - 1)]
    # Uniform in a triangle: Osada et al. 2002, eq. 1.
    root, v = np.sqrt(draw.random((num_points, 1))), draw.random((num_points, 1))
    points = (1 - root) * corners[:, 0] + root * (1 - v) * corners[:, 1] + root * v * corners[:, 2]
    return np.ascontiguousarray(points.T, np.float32)


def _seed(grid: Bool[np.ndarray, "r r r"]) -> int:
    return int.from_bytes(hashlib.sha256(np.packbits(grid).tobytes()).digest()[:8], "little")


def _no_points(num_points: int) -> Points:
    return np.empty((0, 3, num_points), np.float32)
