"""The report finds what is planted, and nothing in what is sound."""

from __future__ import annotations

import numpy as np
import pytest
import trimesh

from shapediff.geometry.kernels.crossing import crossing_faces
from shapediff.geometry.report import check_mesh, check_surface

BOX = trimesh.creation.box()


def both(*meshes: trimesh.Trimesh) -> trimesh.Trimesh:
    return trimesh.util.concatenate(meshes)


def moved(by: list[float], scale: float = 1.0) -> trimesh.Trimesh:
    return trimesh.creation.box(extents=[scale] * 3, transform=trimesh.transformations.translation_matrix(by))


def test_a_box_of_two_metres_by_one() -> None:
    report = check_mesh(trimesh.creation.box(extents=[1, 2, 1]))
    assert report.is_printable
    assert report.to_dict() == {
        "closed": True,
        "manifold": True,
        "degenerate": 0,
        "crossing": 0,
        "parts": 1,
        "cavities": 0,
        "faces": 12,
        "volume": pytest.approx(2),
        "area": pytest.approx(10),
        "size": [1, 2, 1],
    }


def test_parts_and_cavities_are_counted() -> None:
    hollow = moved([0, 0, 0], 0.5)
    hollow.invert()
    report = check_mesh(both(BOX, hollow, moved([3, 0, 0])))
    assert (report.parts, report.cavities, report.is_printable) == (2, 1, True)
    assert report.volume == pytest.approx(2 - 0.125)


def test_faults_are_found() -> None:
    vertices, faces = np.array(BOX.vertices), np.array(BOX.faces)
    assert not check_surface(vertices, faces[1:]).closed
    flipped = faces.copy()
    flipped[0] = flipped[0, ::-1]
    assert not check_surface(vertices, flipped).closed
    assert not check_surface(vertices, np.concatenate([faces, faces[:1]])).closed
    inverted = check_surface(vertices, faces[:, ::-1])
    assert inverted.closed and not inverted.is_printable
    # Boxes that touch: the vertices at the same place are one to a reader, whatever their numbers.
    by_corner, by_edge = check_mesh(both(BOX, moved([1, 1, 1]))), check_mesh(both(BOX, moved([1, 1, 0])))
    assert by_corner.closed and not by_corner.manifold
    assert not by_edge.closed and not by_edge.manifold


def test_faces_without_height_are_counted() -> None:
    """A vertex in the middle of an edge, joined to its ends by two faces of no height: closed, and not printable."""
    vertices, faces = np.array(BOX.vertices), np.array(BOX.faces)
    a, b, c = faces[0]
    vertices = np.vstack([vertices, (vertices[a] + vertices[b]) / 2])
    flat = np.vstack([faces[1:], [a, 8, c], [8, b, c], [a, b, 8]])
    report = check_surface(vertices, flat)
    assert report.closed
    assert report.degenerate == 1
    assert not report.is_printable


def test_crossing_faces_against_all_pairs() -> None:
    """The sweep finds what testing each pair of faces finds, by solving for the point where an edge meets a face."""
    rng = np.random.default_rng(0)
    vertices, faces = rng.normal(size=(60, 3)), np.arange(60).reshape(-1, 3)
    expected = np.zeros(len(faces), bool)
    for i in range(len(faces)):
        for j in range(len(faces)):
            for k in range(3):
                p, q = vertices[faces[i, k]], vertices[faces[i, (k + 1) % 3]]
                a, b, c = vertices[faces[j]]
                if i != j:
                    along, u, v = np.linalg.solve(np.stack([p - q, b - a, c - a], axis=1), p - a)
                    if 0 < along < 1 and u > 0 and v > 0 and u + v < 1:
                        expected[[i, j]] = True
    assert 0 < expected.sum() < len(faces)
    assert np.array_equal(crossing_faces(vertices, faces), expected)


def test_crossing_counts_neighbours_by_a_corner_but_no_touch() -> None:
    """Two faces that share vertex 0: the edge 3-4 passes through the first, or ends on it, or stays away."""
    for height, crosses in ((-0.5, True), (0.0, False), (0.5, False)):
        vertices = np.array([[0, 0, 0], [2, 0, 0], [0, 2, 0], [0.5, 0.5, height], [0.5, 0.5, 1.0]])
        assert crossing_faces(vertices, np.array([[0, 1, 2], [0, 3, 4]])).all() == crosses
    assert check_mesh(both(BOX, moved([0.5, 0.4, 0.3]))).crossing > 0
