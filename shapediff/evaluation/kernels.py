"""The loop of the Chamfer distance, compiled by numba: exact, every point against every point."""

from __future__ import annotations

import numpy as np
from numba import njit

_FAR = np.float32(np.inf)


@njit(cache=True, nogil=True, fastmath={"contract", "arcp", "nsz", "reassoc"})
def _lower_to_nearest(a, b, squared):  # type: ignore[no-untyped-def]
    """Lower squared[j] to the squared distance of point j of b (3, m) from its nearest in a (3, n).

    Four points of a at a time: the inner loop over b then has no dependence from one round to the next, and becomes vector code.
    """
    n, m = a.shape[1], b.shape[1]
    bx, by, bz = b[0], b[1], b[2]
    for i in range(0, n, 4):
        i1, i2, i3 = min(i + 1, n - 1), min(i + 2, n - 1), min(i + 3, n - 1)
        x0, y0, z0 = a[0, i], a[1, i], a[2, i]
        x1, y1, z1 = a[0, i1], a[1, i1], a[2, i1]
        x2, y2, z2 = a[0, i2], a[1, i2], a[2, i2]
        x3, y3, z3 = a[0, i3], a[1, i3], a[2, i3]
        for j in range(m):
            x, y, z = bx[j], by[j], bz[j]
            d0 = (x - x0) * (x - x0) + (y - y0) * (y - y0) + (z - z0) * (z - z0)
            d1 = (x - x1) * (x - x1) + (y - y1) * (y - y1) + (z - z1) * (z - z1)
            d2 = (x - x2) * (x - x2) + (y - y2) * (y - y2) + (z - z2) * (z - z2)
            d3 = (x - x3) * (x - x3) + (y - y3) * (y - y3) + (z - z3) * (z - z3)
            squared[j] = min(squared[j], min(min(d0, d1), min(d2, d3)))


@njit(cache=True, nogil=True)
def chamfer_rows(a, b, is_symmetric, out):  # type: ignore[no-untyped-def]
    """Fill out (n, m) with the Chamfer distances of each of a (n, 3, p) from each of b (m, 3, q), float32.

    `is_symmetric`: b is a; only the part right of the diagonal is filled.
    """
    from_b, from_a = np.empty(b.shape[2], np.float32), np.empty(a.shape[2], np.float32)
    for i in range(a.shape[0]):
        for j in range(i + 1 if is_symmetric else 0, b.shape[0]):
            from_b[:] = _FAR
            from_a[:] = _FAR
            _lower_to_nearest(a[i], b[j], from_b)
            _lower_to_nearest(b[j], a[i], from_a)
            one, other = 0.0, 0.0
            for k in range(len(from_b)):
                one += from_b[k]
            for k in range(len(from_a)):
                other += from_a[k]
            out[i, j] = one / len(from_b) + other / len(from_a)
