"""Distances against brute force, SciPy, POT and closed forms."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.spatial import cKDTree

from shapediff.evaluation.distances import (
    DISTANCES,
    EMD_POINTS,
    chamfer,
    earth_mover,
    euclidean,
    iou_distance,
    shading_distance,
    sliced_wasserstein,
)
from shapediff.evaluation.pictures import PICTURE_SIZE, VIEWS, shaded_pictures
from shapediff.evaluation.points import surface_points


def clouds(num: int, num_points: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).random((num, 3, num_points)) - 0.5).astype(np.float32)


def ball(resolution: int, radius: float, centre: tuple[float, float, float] = (0, 0, 0)) -> np.ndarray:
    axis = (np.arange(resolution) + 0.5) / resolution - 0.5
    x, y, z = np.meshgrid(axis, axis, axis, indexing="ij")
    return (x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2 < radius**2


@pytest.mark.parametrize(("p", "q"), [(1, 1), (5, 7), (64, 64), (130, 61)])
def test_chamfer_is_that_of_a_search_tree_in_float64(p: int, q: int) -> None:
    a, b = clouds(3, p), clouds(2, q, seed=1)
    expected = [
        [
            np.square(cKDTree(y.T).query(x.T)[0]).mean() + np.square(cKDTree(x.T).query(y.T)[0]).mean()
            for y in b.astype(np.float64)
        ]
        for x in a.astype(np.float64)
    ]
    # float32 differences of coordinates below 1 are exact to 6e-8.
    np.testing.assert_allclose(chamfer(a, b), expected, rtol=1e-5, atol=1e-12)


def test_chamfer_of_one_point_each_is_twice_the_squared_distance() -> None:
    a, b = np.zeros((1, 3, 1), np.float32), np.array([[[0.3], [0.0], [0.4]]], np.float32)
    assert chamfer(a, b)[0, 0] == pytest.approx(2 * 0.25)


@pytest.mark.parametrize("name", DISTANCES)
def test_a_set_against_itself_is_symmetric_with_nothing_on_the_diagonal(name: str) -> None:
    grids = np.random.default_rng(0).random((4, 8, 8, 8)) < 0.5
    shapes = {"points": clouds(4, 40), "grids": grids, "pictures": shaded_pictures(grids)}[DISTANCES[name].of]
    measure = DISTANCES[name].measure
    own, pairs = measure(shapes, None, None), []
    np.testing.assert_allclose(own, measure(shapes, shapes.copy(), None), atol=1e-7)
    np.testing.assert_array_equal(own, own.T)
    assert (np.diag(own) == 0).all()
    assert (own[~np.eye(4, dtype=bool)] > 0).all()
    measure(shapes, None, pairs.append)
    measure(shapes, shapes[:2], pairs.append)
    assert sum(pairs) == 6 + 8


def test_earth_mover_is_that_of_pot() -> None:
    import ot

    a, b = clouds(2, 40), clouds(2, 40, seed=1)
    weights = np.full(40, 1 / 40)
    expected = [
        [ot.emd2(weights, weights, np.linalg.norm(x.T[:, None] - y.T[None], axis=-1)) for y in b.astype(np.float64)]
        for x in a.astype(np.float64)
    ]
    np.testing.assert_allclose(earth_mover(a, b), expected, rtol=1e-6)


def test_transport_distances_of_a_shift() -> None:
    """A shift by v costs |v|; SW^2 is the mean of (v . direction)^2 = |v|^2 / 3 over evenly spread directions."""
    a = clouds(1, 300)
    shift = np.array([0.1, -0.2, 0.05], np.float32)
    b = a + shift[None, :, None]
    length = np.linalg.norm(shift)
    assert earth_mover(a, b)[0, 0] == pytest.approx(length, rel=1e-5)
    assert sliced_wasserstein(a, b)[0, 0] == pytest.approx(length / np.sqrt(3), rel=1e-2)


def test_sliced_wasserstein_is_sorted_matching_and_below_the_earth_mover() -> None:
    import ot
    from scipy.optimize import linear_sum_assignment

    a, b = clouds(3, 200), 0.5 * clouds(3, 200, seed=1)
    found = sliced_wasserstein(a, b)
    for i in range(3):
        for j in range(3):
            x, y = a[i].T.astype(np.float64), b[j].T.astype(np.float64)
            other = ot.sliced_wasserstein_distance(x, y, n_projections=500, seed=0)
            assert found[i, j] == pytest.approx(other, rel=0.06)
            squared = np.square(x[:, None] - y[None]).sum(-1)
            w2 = squared[linear_sum_assignment(squared)].mean()
            assert found[i, j] ** 2 < 1.02 * w2 / 3


def test_earth_mover_takes_the_first_points_alone() -> None:
    a, b = clouds(1, EMD_POINTS + 9), clouds(1, EMD_POINTS + 9, seed=1)
    for measure in (earth_mover, sliced_wasserstein):
        assert measure(a, b) == measure(a[..., :EMD_POINTS], b[..., :EMD_POINTS])


def test_iou_by_counting() -> None:
    draw = np.random.default_rng(0)
    a, b = draw.random((5, 8, 8, 8)) < 0.3, draw.random((300, 8, 8, 8)) < 0.6
    expected = [[1 - (x & y).sum() / (x | y).sum() for y in b] for x in a]
    np.testing.assert_allclose(iou_distance(a, b), expected, rtol=1e-12)
    np.testing.assert_allclose(iou_distance(b, a).T, expected, rtol=1e-12)


def test_iou_of_empty_grids() -> None:
    empty, full = np.zeros((1, 4, 4, 4), bool), np.ones((1, 4, 4, 4), bool)
    assert iou_distance(empty, empty) == 0
    assert iou_distance(empty, full) == 1


def test_euclidean_of_near_rows_keeps_what_is_small() -> None:
    a = np.full((1, 3), 1000.0)
    assert euclidean(a, a + np.array([[3e-9, 0, 4e-9]]))[0, 0] == pytest.approx(5e-9, rel=1e-3)


def test_points_lie_on_the_surface_evenly() -> None:
    radius, resolution = 0.35, 32
    points = surface_points(ball(resolution, radius)[None], num_points=8192)[0]
    away = np.linalg.norm(points, axis=0) - radius
    assert np.abs(away).max() < 1.0 / resolution  # marching cubes of a binary ball lies within a voxel of it
    # By area: as much in each half space, and a third of the second moment in each axis.
    assert np.abs((points > 0).mean(1) - 0.5).max() < 4 * 0.5 / np.sqrt(8192)
    moments = np.square(points).mean(1)
    np.testing.assert_allclose(moments, moments.mean(), rtol=0.05)


def test_points_of_a_shape_are_its_own() -> None:
    grids = np.stack([ball(16, 0.2), ball(16, 0.3), np.zeros((16, 16, 16), bool)])
    points = surface_points(grids, num_points=64)
    np.testing.assert_array_equal(surface_points(grids[1:2], num_points=64)[0], points[1])
    assert (points[2] == 0).all()
    assert surface_points(grids[:0], num_points=64).shape == (0, 3, 64)


def test_the_shading_distance_is_the_rms_difference_of_brightness() -> None:
    draw = np.random.default_rng(0)
    a, b = (draw.integers(0, 256, (num, 2, 5, 5), dtype=np.uint8) for num in (3, 4))
    expected = [[np.sqrt(np.mean((x / 255 - y / 255) ** 2)) for y in b] for x in a]
    np.testing.assert_allclose(shading_distance(a, b), expected, rtol=1e-12)
    black, white = np.zeros((1, 8, 4, 4), np.uint8), np.full((1, 8, 4, 4), 255, np.uint8)
    assert shading_distance(black, white)[0, 0] == 1


def test_pictures_see_the_surface_from_all_sides_and_nothing_else() -> None:
    """A hollow that nothing leads to is not seen; a dent is, on whichever side; what moved farther looks more different."""
    solid, axis = ball(32, 0.35), (np.arange(32) + 0.5) / 32 - 0.5
    hollow = solid & ~ball(32, 0.15)
    dented = [solid & ~np.moveaxis(np.broadcast_to(axis[:, None, None] > 0.2, solid.shape), 0, i) for i in range(3)]
    dented += [np.flip(dent, i) for i, dent in enumerate(dented)]
    moved = [ball(32, 0.35, (step / 16, 0, 0)) for step in range(1, 3)]
    away = shading_distance(shaded_pictures(np.stack([solid, hollow, *dented, *moved])))[0]
    assert away[1] == 0 and (away[2:] > 0.03).all() and away[-1] > away[-2]


def test_pictures_are_of_flat_faces_as_lambert_says() -> None:
    """A cube from its corners: the whole picture is background and three shades, those of the three faces that look there.

    0.5 * 1.15 * (0.45 (0.65 + 0.35 n_y) + 0.55 max(0, n.l)) * 255, up to the blur of a few pixels where faces meet.
    """
    grids = np.zeros((2, 16, 16, 16), bool)
    grids[0, 3:13, 3:13, 3:13] = True
    pictures = shaded_pictures(grids)
    assert pictures.shape == (2, len(VIEWS), PICTURE_SIZE, PICTURE_SIZE)
    assert len(np.unique(pictures[1])) == 1  # an empty grid
    light = np.array([0.35, 0.80, 0.50]) / np.linalg.norm([0.35, 0.80, 0.50])
    for picture, (azimuth, elevation) in zip(pictures[0], VIEWS, strict=True):
        towards = np.sign([np.sin(np.radians(azimuth)), np.sin(np.radians(elevation)), np.cos(np.radians(azimuth))])
        normals = np.diag(towards)
        shades = 127.5 * 1.15 * (0.45 * (0.65 + 0.35 * normals[:, 1]) + 0.55 * (normals @ light).clip(0))
        known = np.concatenate([shades, pictures[1].ravel()[:1]])
        off = np.abs(picture.astype(float)[..., None] - known).min(-1)
        assert (off <= 1).mean() > 0.8
        assert all((np.abs(picture - shade) <= 1).sum() > 15 for shade in shades)
