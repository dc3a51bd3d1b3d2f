"""Which faces of a mesh pass through others of it."""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float, Int
from numba import njit


def crossing_faces(vertices: Float[np.ndarray, "v 3"], faces: Int[np.ndarray, "f 3"]) -> Bool[np.ndarray, " f"]:
    """Whether each face is passed through by an edge of another, or an edge of it passes through another.

    Faces that touch, lie in one plane or share an edge do not count. Sweep and prune: sorted along the longest side of the mesh,
    a face meets the others of its slice only.
    """
    corners = np.ascontiguousarray(vertices[faces], np.float64)
    low, high = corners.min(1), corners.max(1)
    axis = int(np.argmax(np.ptp(vertices, axis=0)))
    turned = np.roll(np.arange(3), -axis)  # the axis of the sweep comes first
    order = np.argsort(low[:, axis], kind="stable")
    found = _sweep(
        corners[order], np.ascontiguousarray(faces[order], np.int64), low[order][:, turned], high[order][:, turned]
    )
    is_crossing = np.zeros(len(faces), bool)
    is_crossing[order] = found
    return is_crossing


@njit(cache=True)
def _sweep(
    corners: Float[np.ndarray, "f 3 3"],
    faces: Int[np.ndarray, "f 3"],
    low: Float[np.ndarray, "f 3"],
    high: Float[np.ndarray, "f 3"],
) -> Bool[np.ndarray, " f"]:
    found = np.zeros(len(faces), np.bool_)
    for i in range(len(faces)):
        for j in range(i + 1, len(faces)):
            if low[j, 0] > high[i, 0]:
                break
            apart = False
            for k in range(1, 3):
                apart = apart or low[j, k] > high[i, k] or low[i, k] > high[j, k]
            if not apart and _cross(corners[i], corners[j], faces[i], faces[j]):
                found[i] = found[j] = True
    return found


@njit(cache=True)
def _cross(
    a: Float[np.ndarray, "3 3"],
    b: Float[np.ndarray, "3 3"],
    names_a: Int[np.ndarray, "3"],
    names_b: Int[np.ndarray, "3"],
) -> bool:
    shared, at_a, at_b = 0, -1, -1
    for i in range(3):
        for j in range(3):
            if names_a[i] == names_b[j]:
                shared, at_a, at_b = shared + 1, i, j
    if shared > 1:
        return False
    for k in range(3):
        # With a corner in common, only the edges opposite to it can pass through.
        if (at_a < 0 or k == at_a) and _pierces(a[(k + 1) % 3], a[(k + 2) % 3], b):
            return True
        if (at_b < 0 or k == at_b) and _pierces(b[(k + 1) % 3], b[(k + 2) % 3], a):
            return True
    return False


@njit(cache=True)
def _pierces(p: Float[np.ndarray, "3"], q: Float[np.ndarray, "3"], t: Float[np.ndarray, "3 3"]) -> bool:
    """Whether the segment pq passes through the inside of the triangle t: five signs of volumes."""
    if _volume(t[0], t[1], t[2], p) * _volume(t[0], t[1], t[2], q) >= 0:
        return False
    u, v, w = _volume(p, q, t[0], t[1]), _volume(p, q, t[1], t[2]), _volume(p, q, t[2], t[0])
    return (u > 0 and v > 0 and w > 0) or (u < 0 and v < 0 and w < 0)


@njit(cache=True)
def _volume(
    a: Float[np.ndarray, "3"], b: Float[np.ndarray, "3"], c: Float[np.ndarray, "3"], d: Float[np.ndarray, "3"]
) -> float:
    """Six times the volume of a tetrahedron."""
    x0, x1, x2 = b[0] - a[0], b[1] - a[1], b[2] - a[2]
    y0, y1, y2 = c[0] - a[0], c[1] - a[1], c[2] - a[2]
    z0, z1, z2 = d[0] - a[0], d[1] - a[1], d[2] - a[2]
    return x0 * (y1 * z2 - y2 * z1) - x1 * (y0 * z2 - y2 * z0) + x2 * (y0 * z1 - y1 * z0)
