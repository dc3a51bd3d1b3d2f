"""Exact distances to triangles near them. Coordinates are in voxels: voxel i has its centre at i + 0.5."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True)
def signed_distance(triangles, inside, band, least):  # type: ignore[no-untyped-def]
    """(R, R, R) float32 in [-1, 1]: the distance in voxels over `band`, negative where `inside`; no value nearer 0 than `least`.

    triangles: (n, 3, 3) float64.
    """
    signed = np.empty(inside.shape, np.float32)
    for x in range(inside.shape[0]):
        for y in range(inside.shape[1]):
            for z in range(inside.shape[2]):
                signed[x, y, z] = band * band
    _lower_to_squared_distance(triangles, band, signed)
    for x in range(inside.shape[0]):
        for y in range(inside.shape[1]):
            for z in range(inside.shape[2]):
                distance = max(np.sqrt(signed[x, y, z]) / band, least) if signed[x, y, z] < band * band else 1.0
                signed[x, y, z] = -distance if inside[x, y, z] else distance
    return signed


@njit(cache=True)
def _lower_to_squared_distance(triangles, band, squared):  # type: ignore[no-untyped-def]
    """Lower `squared` to the squared distance to triangles nearer than `band`.

    A triangle concerns the voxels within `band` of its plane and of the planes through its edges at right angles to it; these
    cut an interval out of each row of voxels.
    """
    resolution = squared.shape[0]
    low, high, centre = np.empty(3, np.int64), np.empty(3, np.int64), np.empty(3)
    planes, offsets = np.empty((5, 3)), np.empty(5)
    for n in range(triangles.shape[0]):
        t = triangles[n]
        for k in range(3):
            low[k] = max(int(np.ceil(min(t[0, k], t[1, k], t[2, k]) - band - 0.5)), 0)
            high[k] = min(int(np.floor(max(t[0, k], t[1, k], t[2, k]) + band - 0.5)), resolution - 1)
            centre[k] = (t[0, k] + t[1, k] + t[2, k]) / 3
        radius = 0.0
        for c in range(3):
            radius = max(
                radius, np.sqrt((t[c, 0] - centre[0]) ** 2 + (t[c, 1] - centre[1]) ** 2 + (t[c, 2] - centre[2]) ** 2)
            )
        num_planes = _slabs(t, band, planes, offsets)
        for x in range(low[0], high[0] + 1):
            for y in range(low[1], high[1] + 1):
                px, py = x + 0.5, y + 0.5
                first, last = low[2], high[2]
                if radius > band:  # else its box is small, and cutting it costs more than it spares
                    first, last = _interval(planes, offsets, num_planes, px, py, first, last)
                height = planes[0, 0] * px + planes[0, 1] * py + band - offsets[0]
                from_axis = (px - centre[0]) ** 2 + (py - centre[1]) ** 2
                for z in range(first, last + 1):
                    # Two lower bounds spare most of the work: from the plane, and from the ball around the triangle.
                    to_plane = height + planes[0, 2] * (z + 0.5)
                    nearest = squared[x, y, z]
                    if num_planes > 0 and to_plane * to_plane >= nearest:
                        continue
                    reach = np.sqrt(nearest) + radius
                    if from_axis + (z + 0.5 - centre[2]) ** 2 >= reach * reach:
                        continue
                    found = _squared_distance(t, px, py, z + 0.5)
                    if found < nearest:
                        squared[x, y, z] = found


@njit(cache=True)
def _slabs(t, band, planes, offsets):  # type: ignore[no-untyped-def]
    """Half-spaces planes[i] . p <= offsets[i] that hold every point within `band` of the triangle, its own planes first.

    Returns how many there are: 5, or 0 for a triangle so thin that its plane is all rounding.
    """
    for c in range(3):
        for k in range(3):
            planes[2 + c, k] = t[(c + 1) % 3, k] - t[c, k]  # the edges, for now
    nx, ny, nz = _cross(planes[2], planes[3])
    double_area = np.sqrt(nx * nx + ny * ny + nz * nz)
    longest = max(_dot(planes[2], planes[2]), _dot(planes[3], planes[3]), _dot(planes[4], planes[4]))
    if double_area <= 1e-9 * longest:
        return 0
    normal = planes[0]
    normal[0], normal[1], normal[2] = nx / double_area, ny / double_area, nz / double_area
    height = _dot(normal, t[0])
    offsets[0], offsets[1] = height + band, band - height
    for k in range(3):
        planes[1, k] = -normal[k]
    for c in range(3):
        length = np.sqrt(_dot(planes[2 + c], planes[2 + c]))
        away = _cross(planes[2 + c], normal)
        for k in range(3):
            planes[2 + c, k] = away[k] / length
        offsets[2 + c] = _dot(planes[2 + c], t[c]) + band
    return 5


@njit(cache=True)
def _cross(a, b):  # type: ignore[no-untyped-def]
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


@njit(cache=True)
def _dot(a, b):  # type: ignore[no-untyped-def]
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2]


@njit(cache=True)
def _interval(planes, offsets, num_planes, px, py, first, last):  # type: ignore[no-untyped-def]
    """The part of the row of voxel centres (px, py, z + 0.5), z in [first, last], within all half-spaces, and a little more."""
    bottom, top = float(first), float(last)
    for i in range(num_planes):
        room = offsets[i] - planes[i, 0] * px - planes[i, 1] * py
        slope = planes[i, 2]
        if slope > 1e-9:
            top = min(top, room / slope - 0.5)
        elif slope < -1e-9:
            bottom = max(bottom, room / slope - 0.5)
        elif room < -1e-6:
            return 0, -1
    return max(first, int(np.ceil(bottom - 1e-6))), min(last, int(np.floor(top + 1e-6)))


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
