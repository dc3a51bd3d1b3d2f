"""The loops of voxelization, compiled by numba. Coordinates are in voxels: voxel i has its centre at i + 0.5.

A *line* runs through voxel centres along one axis; (u, v) are the two axes after it in cyclic order. What a surface does to
a grid is read off the crossings of these lines, sorted by depth. A *chord* is one stretch of a line inside the shape.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from shapediff.geometry.kernels.flood import fill_enclosed

MIN_PARALLEL = 0.5
"""Two crossings are the two sides of one thin wall if their normals have an inner product beyond this, whatever its sign."""


@njit(cache=True)
def fill_closed(triangles, normals, solid, thin):  # type: ignore[no-untyped-def]
    """Set `solid` where the winding number of closed pieces is not 0, and `thin` for the walls of one voxel or less.

    triangles: (n, 3, 3) float64; normals: (n, 3), unit. solid, thin: (R, R, R) bool.
    """
    low = np.zeros(3, np.int64)
    high = np.array(solid.shape)
    for axis in range(3):
        start, depth, crossing = _crossings(triangles, axis, low, high)
        size_v = high[(axis + 2) % 3]
        for line in range(len(start) - 1):
            u, v = line // size_v, line % size_v
            winding, entry = 0, start[line]
            for i in range(start[line], start[line + 1]):
                before = winding
                winding += 1 if crossing[i] > 0 else -1
                if before == 0:
                    entry = i
                elif winding == 0:
                    _fill_chord(axis, u, v, entry, i, depth, crossing, normals, low, high, axis == 2, solid, thin)


@njit(cache=True)
def fill_open(triangles, normals, starts, max_bare, min_covered, solid, thin, surface, crossed):  # type: ignore[no-untyped-def]
    """Add to `solid` and `thin` each piece that encloses something, to `surface` every one; returns which enclose, (p,) bool.

    In `crossed`, uint8, bit k of a voxel is set if a face lies between its centre and that of the next voxel along axis k.

    Piece p is triangles[starts[p]:starts[p + 1]]. A line that crosses it an even number of times tells inside from outside by
    parity; one that crosses it an odd number of times met a hole and tells nothing. Inside is what at least two of the three
    lines through a voxel centre call inside. A piece is a sheet and encloses nothing if more than `max_bare` of the border of
    that inside has no surface near, or less than `min_covered` of its surface has that inside near. Before a piece is given up,
    what its inside and its surface seal off is filled: scattered holes leave an inside full of pores.
    """
    encloses = np.zeros(len(starts) - 1, np.bool_)
    low, high = np.empty(3, np.int64), np.empty(3, np.int64)
    for p in range(len(starts) - 1):
        piece = triangles[starts[p] : starts[p + 1]]
        for k in range(3):
            low[k] = max(int(np.floor(piece[:, :, k].min())) - 1, 0)
            high[k] = min(int(np.floor(piece[:, :, k].max())) + 2, solid.shape[k])
        if (high <= low).any():
            continue
        size = (high[0] - low[0], high[1] - low[1], high[2] - low[2])
        votes, inside = np.zeros(size, np.int8), np.zeros(size, np.bool_)
        thin_here, surface_here = np.zeros(size, np.bool_), np.zeros(size, np.bool_)
        for axis in range(3):
            _vote_lines(piece, normals[starts[p] : starts[p + 1]], axis, low, high, votes, thin_here, crossed)
        for x in range(size[0]):
            for y in range(size[1]):
                for z in range(size[2]):
                    inside[x, y, z] = votes[x, y, z] >= 2
        mark_surface(piece, low, surface_here)
        encloses[p] = _is_wrapped(inside, surface_here, max_bare, min_covered)
        if not encloses[p] and inside.any():
            fill_enclosed(inside, surface_here, crossed[low[0] : high[0], low[1] : high[1], low[2] : high[2]])
            encloses[p] = _is_wrapped(inside, surface_here, max_bare, min_covered)
        for x in range(size[0]):
            for y in range(size[1]):
                for z in range(size[2]):
                    i, j, k = low[0] + x, low[1] + y, low[2] + z
                    surface[i, j, k] |= surface_here[x, y, z]
                    if encloses[p]:
                        solid[i, j, k] |= inside[x, y, z]
                        thin[i, j, k] |= thin_here[x, y, z]
    return encloses


@njit(cache=True)
def _vote_lines(piece, normals, axis, low, high, votes, thin, crossed):  # type: ignore[no-untyped-def]
    start, depth, crossing = _crossings(piece, axis, low, high)
    size_v = high[(axis + 2) % 3] - low[(axis + 2) % 3]
    inside = np.zeros(votes.shape, np.bool_)
    for line in range(len(start) - 1):
        u, v = line // size_v, line % size_v
        for i in range(start[line], start[line + 1]):
            before = int(np.ceil(depth[i] - 0.5)) - 1
            if low[axis] <= before < high[axis]:
                x, y, z = _cell(axis, u, v, before - low[axis])
                crossed[low[0] + x, low[1] + y, low[2] + z] |= 1 << axis
        if (start[line + 1] - start[line]) % 2:
            continue
        for i in range(start[line], start[line + 1], 2):
            _fill_chord(axis, u, v, i, i + 1, depth, crossing, normals, low, high, True, inside, thin)
    for x in range(votes.shape[0]):
        for y in range(votes.shape[1]):
            for z in range(votes.shape[2]):
                votes[x, y, z] += inside[x, y, z]


@njit(cache=True)
def _is_wrapped(inside, surface, max_bare, min_covered):  # type: ignore[no-untyped-def]
    """Whether surface and inside lie along each other; see `fill_open`."""
    border, bare, shell, covered = 0, 0, 0, 0
    for x in range(inside.shape[0]):
        for y in range(inside.shape[1]):
            for z in range(inside.shape[2]):
                if surface[x, y, z]:
                    shell += 1
                    covered += _any_around(inside, x, y, z)
                if inside[x, y, z] and _is_border(inside, x, y, z):
                    border += 1
                    bare += not _any_around(surface, x, y, z)
    return border > 0 and bare <= max_bare * border and covered >= min_covered * shell


@njit(cache=True)
def _is_border(inside, x, y, z):  # type: ignore[no-untyped-def]
    """Whether a face-neighbour is outside; what lies beyond the grid is not."""
    for axis in range(3):
        for step in (-1, 1):
            i, j, k = x + step * (axis == 0), y + step * (axis == 1), z + step * (axis == 2)
            if (
                0 <= i < inside.shape[0]
                and 0 <= j < inside.shape[1]
                and 0 <= k < inside.shape[2]
                and not inside[i, j, k]
            ):
                return True
    return False


@njit(cache=True)
def _fill_chord(axis, u, v, i, j, depth, crossing, normals, low, high, fills, solid, thin):  # type: ignore[no-untyped-def]
    """Set in `solid` the centres between crossings i and j, in `thin` the one voxel that stands for a wall with one or none."""
    first, last = int(np.ceil(depth[i] - 0.5)), int(np.ceil(depth[j] - 0.5))
    if fills:
        for k in range(max(first, low[axis]), min(last, high[axis])):
            x, y, z = _cell(axis, u, v, k - low[axis])
            solid[x, y, z] = True
    if last > first + 1:
        return
    middle = first if first < last else int(np.floor((depth[i] + depth[j]) / 2))
    one, other = normals[abs(crossing[i]) - 1], normals[abs(crossing[j]) - 1]
    # The line must go through the wall, not graze it: it is the axis that the wall faces most.
    is_wall = _faces(one, axis) and _faces(other, axis) and abs(one @ other) > MIN_PARALLEL
    if is_wall and low[axis] <= middle < high[axis]:
        x, y, z = _cell(axis, u, v, middle - low[axis])
        thin[x, y, z] = True


@njit(cache=True)
def _faces(normal, axis):  # type: ignore[no-untyped-def]
    return abs(normal[axis]) >= 0.999 * max(abs(normal[0]), abs(normal[1]), abs(normal[2]))


@njit(cache=True)
def _cell(axis, u, v, w):  # type: ignore[no-untyped-def]
    if axis == 0:
        return w, u, v
    if axis == 1:
        return v, w, u
    return u, v, w


@njit(cache=True)
def _crossings(triangles, axis, low, high):  # type: ignore[no-untyped-def]
    """The crossings of the lines of a box of voxels [low, high), line after line, each sorted by depth.

    Returns (start (lines + 1,), depth (m,), crossing (m,)): line (u, v) is number u * size_v + v; its crossings are
    depth[start[line]:start[line + 1]]; crossing is triangle + 1, negative where the line leaves an outward-oriented surface.
    A line through an edge or a vertex that triangles share is counted once: ties go by the direction of the edge, which is
    opposite in the two triangles.
    """
    u_axis, v_axis = (axis + 1) % 3, (axis + 2) % 3
    low_u, low_v, high_u, high_v = low[u_axis], low[v_axis], high[u_axis], high[v_axis]
    room = 4 * len(triangles) + 64
    lines, depths, names = np.empty(room, np.int64), np.empty(room, np.float64), np.empty(room, np.int64)
    found = 0
    for n in range(len(triangles)):
        u0, v0, w0 = triangles[n, 0, u_axis], triangles[n, 0, v_axis], triangles[n, 0, axis]
        u1, v1, w1 = triangles[n, 1, u_axis], triangles[n, 1, v_axis], triangles[n, 1, axis]
        u2, v2, w2 = triangles[n, 2, u_axis], triangles[n, 2, v_axis], triangles[n, 2, axis]
        area = (u1 - u0) * (v2 - v0) - (u2 - u0) * (v1 - v0)
        if area == 0.0:
            continue
        name = -(n + 1)  # counter-clockwise seen from +axis: the normal looks along the line, which leaves
        if area < 0.0:
            name = n + 1
            u1, v1, w1, u2, v2, w2 = u2, v2, w2, u1, v1, w1
        first_u = max(int(np.ceil(min(u0, u1, u2) - 0.5)), low_u)
        last_u = min(int(np.floor(max(u0, u1, u2) - 0.5)), high_u - 1)
        first_v = max(int(np.ceil(min(v0, v1, v2) - 0.5)), low_v)
        last_v = min(int(np.floor(max(v0, v1, v2) - 0.5)), high_v - 1)
        for i in range(first_u, last_u + 1):
            for j in range(first_v, last_v + 1):
                pu, pv = i + 0.5, j + 0.5
                e0 = _edge(u1, v1, u2, v2, pu, pv)
                e1 = _edge(u2, v2, u0, v0, pu, pv)
                e2 = _edge(u0, v0, u1, v1, pu, pv)
                if not (_owns(e0, u2 - u1, v2 - v1) and _owns(e1, u0 - u2, v0 - v2) and _owns(e2, u1 - u0, v1 - v0)):
                    continue
                if found == room:
                    room *= 2
                    lines, depths, names = _longer(lines, room), _longer(depths, room), _longer(names, room)
                lines[found] = (i - low_u) * (high_v - low_v) + j - low_v
                depths[found] = (e0 * w0 + e1 * w1 + e2 * w2) / (e0 + e1 + e2)
                names[found] = name
                found += 1
    return _by_line(lines, depths, names, found, (high_u - low_u) * (high_v - low_v))


@njit(cache=True)
def _longer(values, room):  # type: ignore[no-untyped-def]
    grown = np.empty(room, values.dtype)
    grown[: len(values)] = values
    return grown


@njit(cache=True)
def _by_line(lines, depths, names, found, num_lines):  # type: ignore[no-untyped-def]
    """Sort by line, by counting, and then by depth within each; a soup may cross one line often, so not by insertion there."""
    start = np.zeros(num_lines + 1, np.int64)
    for i in range(found):
        start[lines[i] + 1] += 1
    for line in range(num_lines):
        start[line + 1] += start[line]
    place = start[:-1].copy()
    depth, crossing = np.empty(found, np.float64), np.empty(found, np.int64)
    for i in range(found):
        depth[place[lines[i]]], crossing[place[lines[i]]] = depths[i], names[i]
        place[lines[i]] += 1
    for line in range(num_lines):
        first, last = start[line], start[line + 1]
        if last - first > 32:
            order = np.argsort(depth[first:last], kind="mergesort")
            depth[first:last], crossing[first:last] = depth[first:last][order], crossing[first:last][order]
            continue
        for i in range(first + 1, last):
            d, c, j = depth[i], crossing[i], i
            while j > first and depth[j - 1] > d:
                depth[j], crossing[j] = depth[j - 1], crossing[j - 1]
                j -= 1
            depth[j], crossing[j] = d, c
    return start, depth, crossing


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
def mark_surface(triangles, low, surface):  # type: ignore[no-untyped-def]
    """Set the voxels that hold a point of a net on each triangle finer than half a voxel. surface[0, 0, 0] is voxel `low`.

    The net's rows run along the longest edge, so that a sliver takes few.
    """
    start, along, across = np.empty(3), np.empty(3), np.empty(3)
    for n in range(triangles.shape[0]):
        longest, length = 0, -1.0
        for c in range(3):
            squared = 0.0
            for k in range(3):
                squared += (triangles[n, (c + 1) % 3, k] - triangles[n, c, k]) ** 2
            if squared > length:
                longest, length = c, squared
        inner, across_squared = 0.0, 0.0
        for k in range(3):
            start[k] = triangles[n, longest, k] - low[k]
            along[k] = triangles[n, (longest + 1) % 3, k] - triangles[n, longest, k]
            across[k] = triangles[n, (longest + 2) % 3, k] - triangles[n, longest, k]
            inner += along[k] * across[k]
            across_squared += across[k] ** 2
        height = np.sqrt(max(across_squared - inner * inner / max(length, 1e-300), 0.0))
        num_rows = int(np.ceil(2.0 * height)) + 1
        for i in range(num_rows + 1):
            p = i / num_rows
            steps = int(np.ceil(2.0 * np.sqrt(length) * (1.0 - p))) + 1
            first, last = 0.0, 1.0  # the part of the row within the grid
            for k in range(3):
                begin, run = start[k] + p * across[k], (1.0 - p) * along[k]
                if run == 0.0:
                    if not 0.0 <= begin < surface.shape[k]:
                        last = -1.0
                else:
                    a, b = -begin / run, (surface.shape[k] - begin) / run
                    first, last = max(first, min(a, b)), min(last, max(a, b))
            if first > last:
                continue
            for j in range(max(0, int(first * steps) - 1), min(steps, int(last * steps) + 1) + 1):
                q = (1.0 - p) * j / steps
                x = int(np.floor(start[0] + p * across[0] + q * along[0]))
                y = int(np.floor(start[1] + p * across[1] + q * along[1]))
                z = int(np.floor(start[2] + p * across[2] + q * along[2]))
                if 0 <= x < surface.shape[0] and 0 <= y < surface.shape[1] and 0 <= z < surface.shape[2]:
                    surface[x, y, z] = True


@njit(cache=True)
def keep_thin_walls(solid, thin):  # type: ignore[no-untyped-def]
    """Add `thin` to `solid`, and a voxel wherever one of them touches the solid by an edge alone: steps of a slanted wall."""
    size = solid.shape
    for x in range(size[0]):
        for y in range(size[1]):
            for z in range(size[2]):
                if thin[x, y, z]:
                    solid[x, y, z] = True
    for x in range(size[0]):
        for y in range(size[1]):
            for z in range(size[2]):
                if not thin[x, y, z]:
                    continue
                for axis in range(3):
                    for a in (-1, 1):
                        for b in (-1, 1):
                            du, dv = _cell(axis, a, 0, 0), _cell(axis, 0, b, 0)
                            i, j, k = x + du[0] + dv[0], y + du[1] + dv[1], z + du[2] + dv[2]
                            if not (0 <= i < size[0] and 0 <= j < size[1] and 0 <= k < size[2] and solid[i, j, k]):
                                continue
                            if not (solid[x + du[0], y + du[1], z + du[2]] or solid[x + dv[0], y + dv[1], z + dv[2]]):
                                solid[x + du[0], y + du[1], z + du[2]] = True


@njit(cache=True)
def keep_lost_surface(solid, surface):  # type: ignore[no-untyped-def]
    """Add to `solid` the surface voxels with no solid around them, and the surface beside those, so that a leg stays on."""
    size = solid.shape
    lost = np.zeros(size, np.bool_)
    any_lost = False
    for x in range(size[0]):
        for y in range(size[1]):
            for z in range(size[2]):
                if surface[x, y, z] and not _any_around(solid, x, y, z):
                    lost[x, y, z] = any_lost = True
    if any_lost:
        for x in range(size[0]):
            for y in range(size[1]):
                for z in range(size[2]):
                    if surface[x, y, z] and not solid[x, y, z] and _any_around(lost, x, y, z):
                        solid[x, y, z] = True


@njit(cache=True)
def _any_around(grid, x, y, z):  # type: ignore[no-untyped-def]
    for i in range(max(x - 1, 0), min(x + 2, grid.shape[0])):
        for j in range(max(y - 1, 0), min(y + 2, grid.shape[1])):
            for k in range(max(z - 1, 0), min(z + 2, grid.shape[2])):
                if grid[i, j, k]:
                    return True
    return False
