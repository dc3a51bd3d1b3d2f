"""The loops of voxelization, compiled by numba. Coordinates are in voxels: voxel i has its centre at i + 0.5."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True)
def column_crossings(triangles, axis, crossings):  # type: ignore[no-untyped-def]
    """Add each crossing of each voxel-centre line along `axis` to `crossings`, at the first centre behind it.

    triangles: (n, 3, 3) float64. crossings: (R, R, R + 1) int32 indexed [u, v, depth], u and v the axes after `axis` in
    cyclic order; +1 where the line enters an outward-oriented surface, -1 where it leaves. A line through an edge or a
    vertex that triangles share is counted once: ties go by the direction of the edge, opposite in the two triangles.
    """
    resolution = crossings.shape[0]
    u_axis, v_axis = (axis + 1) % 3, (axis + 2) % 3
    for n in range(triangles.shape[0]):
        u0, v0, w0 = triangles[n, 0, u_axis], triangles[n, 0, v_axis], triangles[n, 0, axis]
        u1, v1, w1 = triangles[n, 1, u_axis], triangles[n, 1, v_axis], triangles[n, 1, axis]
        u2, v2, w2 = triangles[n, 2, u_axis], triangles[n, 2, v_axis], triangles[n, 2, axis]
        area = (u1 - u0) * (v2 - v0) - (u2 - u0) * (v1 - v0)
        if area == 0.0:
            continue
        sign = -1  # counter-clockwise seen from +axis: the normal looks along the line, which leaves
        if area < 0.0:
            sign = 1
            u1, v1, w1, u2, v2, w2 = u2, v2, w2, u1, v1, w1
            area = -area
        first_u = max(int(np.ceil(min(u0, u1, u2) - 0.5)), 0)
        last_u = min(int(np.floor(max(u0, u1, u2) - 0.5)), resolution - 1)
        first_v = max(int(np.ceil(min(v0, v1, v2) - 0.5)), 0)
        last_v = min(int(np.floor(max(v0, v1, v2) - 0.5)), resolution - 1)
        for i in range(first_u, last_u + 1):
            for j in range(first_v, last_v + 1):
                pu, pv = i + 0.5, j + 0.5
                e0 = _edge(u1, v1, u2, v2, pu, pv)
                e1 = _edge(u2, v2, u0, v0, pu, pv)
                e2 = _edge(u0, v0, u1, v1, pu, pv)
                if not (_owns(e0, u2 - u1, v2 - v1) and _owns(e1, u0 - u2, v0 - v2) and _owns(e2, u1 - u0, v1 - v0)):
                    continue
                depth = (e0 * w0 + e1 * w1 + e2 * w2) / (e0 + e1 + e2)
                k = min(max(int(np.ceil(depth - 0.5)), 0), resolution)
                crossings[i, j, k] += sign


@njit(cache=True)
def _edge(au, av, bu, bv, pu, pv):  # type: ignore[no-untyped-def]
    """Twice the signed area of (a, b, p), computed from the same end whichever way the edge is named."""
    if au < bu or (au == bu and av < bv):
        return (bu - au) * (pv - av) - (bv - av) * (pu - au)
    return -((au - bu) * (pv - bv) - (av - bv) * (pu - bu))


@njit(cache=True)
def _owns(edge, du, dv):  # type: ignore[no-untyped-def]
    return edge > 0.0 or (edge == 0.0 and (dv < 0.0 or (dv == 0.0 and du < 0.0)))


@njit(cache=True)
def mark_surface(triangles, surface):  # type: ignore[no-untyped-def]
    """Set the voxels (R, R, R) that hold a point of a net on each triangle finer than half a voxel."""
    resolution = surface.shape[0]
    for n in range(triangles.shape[0]):
        longest = 0.0
        for c in range(3):
            length = 0.0
            for k in range(3):
                length += (triangles[n, (c + 1) % 3, k] - triangles[n, c, k]) ** 2
            longest = max(longest, length)
        steps = int(np.ceil(2.0 * np.sqrt(longest))) + 1
        for a in range(steps + 1):
            for b in range(steps + 1 - a):
                p, q = a / steps, b / steps
                inside = True
                cell = (0, 0, 0)
                x = int(np.floor(_on(triangles, n, 0, p, q)))
                y = int(np.floor(_on(triangles, n, 1, p, q)))
                z = int(np.floor(_on(triangles, n, 2, p, q)))
                cell = (x, y, z)
                for k in range(3):
                    inside = inside and 0 <= cell[k] < resolution
                if inside:
                    surface[x, y, z] = True


@njit(cache=True)
def _on(triangles, n, k, p, q):  # type: ignore[no-untyped-def]
    return (
        triangles[n, 0, k]
        + p * (triangles[n, 1, k] - triangles[n, 0, k])
        + q * (triangles[n, 2, k] - triangles[n, 0, k])
    )


@njit(cache=True)
def banded_distance(triangles, band, squared):  # type: ignore[no-untyped-def]
    """Lower `squared` (R, R, R) float32 to the exact squared distance, in voxels, to triangles nearer than `band`."""
    resolution = squared.shape[0]
    low, high = np.empty(3, np.int64), np.empty(3, np.int64)
    for n in range(triangles.shape[0]):
        for k in range(3):
            c0, c1, c2 = triangles[n, 0, k], triangles[n, 1, k], triangles[n, 2, k]
            low[k] = max(int(np.ceil(min(c0, c1, c2) - band - 0.5)), 0)
            high[k] = min(int(np.floor(max(c0, c1, c2) + band - 0.5)), resolution - 1)
        for x in range(low[0], high[0] + 1):
            for y in range(low[1], high[1] + 1):
                for z in range(low[2], high[2] + 1):
                    d = _squared_distance(triangles[n], x + 0.5, y + 0.5, z + 0.5)
                    if d < squared[x, y, z]:
                        squared[x, y, z] = d


@njit(cache=True)
def _squared_distance(t, px, py, pz):  # type: ignore[no-untyped-def]
    """From a point to a triangle (Ericson 2005, sec. 5.1.5)."""
    abx, aby, abz = t[1, 0] - t[0, 0], t[1, 1] - t[0, 1], t[1, 2] - t[0, 2]
    acx, acy, acz = t[2, 0] - t[0, 0], t[2, 1] - t[0, 1], t[2, 2] - t[0, 2]
    apx, apy, apz = px - t[0, 0], py - t[0, 1], pz - t[0, 2]
    d1, d2 = abx * apx + aby * apy + abz * apz, acx * apx + acy * apy + acz * apz
    if d1 <= 0.0 and d2 <= 0.0:
        return apx * apx + apy * apy + apz * apz
    bpx, bpy, bpz = px - t[1, 0], py - t[1, 1], pz - t[1, 2]
    d3, d4 = abx * bpx + aby * bpy + abz * bpz, acx * bpx + acy * bpy + acz * bpz
    if d3 >= 0.0 and d4 <= d3:
        return bpx * bpx + bpy * bpy + bpz * bpz
    cpx, cpy, cpz = px - t[2, 0], py - t[2, 1], pz - t[2, 2]
    d5, d6 = abx * cpx + aby * cpy + abz * cpz, acx * cpx + acy * cpy + acz * cpz
    if d6 >= 0.0 and d5 <= d6:
        return cpx * cpx + cpy * cpy + cpz * cpz
    vc, vb, va = d1 * d4 - d3 * d2, d5 * d2 - d1 * d6, d3 * d6 - d5 * d4
    if vc <= 0.0 and d1 >= 0.0 and d3 <= 0.0:
        v, w = d1 / (d1 - d3), 0.0
    elif vb <= 0.0 and d2 >= 0.0 and d6 <= 0.0:
        v, w = 0.0, d2 / (d2 - d6)
    elif va <= 0.0 and d4 - d3 >= 0.0 and d5 - d6 >= 0.0:
        w = (d4 - d3) / ((d4 - d3) + (d5 - d6))
        v = 1.0 - w
    else:
        inverse = 1.0 / (va + vb + vc)
        v, w = vb * inverse, vc * inverse
    dx, dy, dz = apx - v * abx - w * acx, apy - v * aby - w * acy, apz - v * abz - w * acz
    return dx * dx + dy * dy + dz * dz
