"""The compiled loops against slow references from scipy and numpy."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.ndimage import binary_fill_holes

from shapediff.geometry.kernels.distance import signed_distance
from shapediff.geometry.kernels.flood import fill_enclosed
from shapediff.geometry.kernels.solid import mark_surface

PARTED = np.uint8(7)
"""A face before each of a voxel's three neighbours: the flood then takes whole voxels of surface as walls, as scipy does."""


@pytest.mark.parametrize(
    "shape", [(5, 6, 7), (9, 8, 63), (6, 11, 64), (7, 5, 65), (12, 3, 130), (1, 1, 1), (20, 20, 20)]
)
@pytest.mark.parametrize("share", [0.2, 0.35, 0.5, 0.9])
def test_flood_fills_what_scipy_fills(shape: tuple[int, int, int], share: float) -> None:
    rng = np.random.default_rng(hash((shape, share)) % 2**32)
    walls = rng.random(shape) < share
    solid = walls & (rng.random(shape) < 0.5)
    surface = walls & ~solid
    filled = solid.copy()
    fill_enclosed(filled, surface, np.full(shape, PARTED))
    sealed = binary_fill_holes(walls) & ~walls
    assert np.array_equal(filled, solid | sealed)


def test_flood_finds_its_way_through_a_long_maze() -> None:
    """One corridor through all of a grid, two words a row, walled off from outside but for its end."""
    size = 40, 9, 101
    wall = np.ones(size, bool)
    wall[1:-1:2, 1:-1, 1:-1] = False  # every other sheet is a room
    wall[1:-1:2, 2:-1:2, 1:-1] = True  # of corridors along z
    for x in range(1, size[0] - 1, 2):
        for n, y in enumerate(range(2, size[1] - 1, 2)):
            wall[x, y, -2 if n % 2 else 1] = False  # joined at alternate ends
        if x + 2 < size[0] - 1:
            wall[x + 1, 1 if (x // 2) % 2 else size[1] - 2, -2] = False  # and the sheets with each other
    closed, opened = wall.copy(), wall.copy()
    opened[0, 1, 1] = False
    for grid in (closed, opened):
        solid = np.zeros(size, bool)
        fill_enclosed(solid, grid, np.full(size, PARTED))
        assert np.array_equal(solid, binary_fill_holes(grid) & ~grid)


def nearest_of_samples(triangle: np.ndarray, points: np.ndarray, num: int = 300) -> np.ndarray:
    """Upper bound on the distance, off by no more than a step of the net."""
    p, q = (grid.ravel() for grid in np.meshgrid(*[np.linspace(0, 1, num)] * 2))
    p, q = p[p + q <= 1], q[p + q <= 1]
    a, b, c = triangle
    net = a + p[:, None] * (b - a) + q[:, None] * (c - a)
    return np.sqrt(((points[:, None] - net) ** 2).sum(-1).min(1))


@pytest.mark.parametrize("size", [0.5, 3.0, 14.0])
def test_distance_is_that_to_the_nearest_point(size: float) -> None:
    rng = np.random.default_rng(int(size * 10))
    resolution, band = 12, 2.5
    axis = np.arange(resolution) + 0.5
    points = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    for _ in range(6):
        triangles = 6 + size * rng.uniform(-0.5, 0.5, (2, 3, 3))
        found = band * signed_distance(triangles, np.zeros((resolution,) * 3, bool), band, 0.0).ravel()
        near = np.flatnonzero(found < band)
        checked = np.r_[near[:150], rng.choice(len(points), 100)]
        reference = np.minimum(*(nearest_of_samples(t, points[checked]) for t in triangles))
        step = 2 * size / 300
        difference = np.minimum(reference, band) - found[checked]
        assert difference.min() > -1e-5, "never more than the distance to a point on the triangle"
        assert difference.max() < step


def test_distance_of_degenerate_triangles() -> None:
    """A triangle that is a segment or a point still has a distance."""
    resolution, band = 8, 3.0
    segment = np.array([[[1.5, 4.5, 4.5], [6.5, 4.5, 4.5], [3.5, 4.5, 4.5]]])
    found = band * signed_distance(segment, np.zeros((resolution,) * 3, bool), band, 0.0)
    assert found[3, 4, 4] == 0 and found[3, 6, 4] == pytest.approx(2) and found[7, 4, 4] == pytest.approx(1)
    point = np.full((1, 3, 3), 4.5)
    found = band * signed_distance(point, np.zeros((resolution,) * 3, bool), band, 0.0)
    assert found[4, 4, 4] == 0 and found[5, 5, 4] == pytest.approx(np.sqrt(2))


def test_distance_takes_its_sign_from_the_solid_and_is_never_zero() -> None:
    inside = np.zeros((8, 8, 8), bool)
    inside[2:5] = True
    triangle = np.array([[[4.5, 0, 0], [4.5, 20, 0], [4.5, 0, 20]]])
    found = signed_distance(triangle, inside, 3.0, 1e-6)
    assert np.array_equal(found < 0, inside)
    assert np.abs(found).min() >= 1e-6 and np.abs(found).max() == 1


def test_a_triangle_far_larger_than_the_grid_is_marked_within_it_at_once() -> None:
    """As much of it as of one that ends just outside: the rows begin and end at the grid."""
    rng = np.random.default_rng(0)
    for _ in range(5):
        corners = 8 + 40 * rng.standard_normal((3, 3))
        centre = corners.mean(0)
        surfaces = []
        for factor in (1.0, 100.0):
            surface = np.zeros((16, 16, 16), bool)
            mark_surface((8 + factor * (corners - centre))[None], np.zeros(3, np.int64), surface)
            surfaces.append(surface)
        small, large = surfaces
        assert large.any()
        assert (small & ~large).mean() < 0.01  # nets of other phases miss corners of voxels here and there
    huge = np.array([[[-1e6, 4.5, -1e6], [1e6, 4.5, -1e6], [0.0, 4.5, 1e6]]])
    surface = np.zeros((16, 16, 16), bool)
    mark_surface(huge, np.zeros(3, np.int64), surface)
    assert surface[:, 4].all() and surface.sum() == 256


@pytest.mark.parametrize("size", [0.3, 4.0, 13.0])
def test_marked_surface_is_where_the_triangle_is(size: float) -> None:
    """Every marked voxel holds a point of it, and every point of it has a marked voxel within half a voxel."""
    rng = np.random.default_rng(int(10 * size))
    for sliver in (1.0, 0.01):
        triangle = 8 + size * rng.uniform(-0.5, 0.5, (3, 3))
        triangle[2] = triangle[0] + 0.4 * (triangle[1] - triangle[0]) + sliver * (triangle[2] - triangle[0])
        surface = np.zeros((16, 16, 16), bool)
        mark_surface(triangle[None], np.zeros(3, np.int64), surface)
        weights = rng.dirichlet((1, 1, 1), 4000)
        on_it = weights @ triangle
        cells = np.argwhere(surface)
        gaps = np.maximum(np.abs(on_it[:, None] - (cells + 0.5)).max(-1) - 0.5, 0).min(1)
        assert gaps.max() < 0.5
        centres = cells + 0.5
        assert nearest_of_samples(triangle, centres).max() <= np.sqrt(3) / 2 + 1e-9
