"""What surfaces seal off: a flood from outside through rows of voxels, 64 of them a word.

Row (x, y) is `words[x, y]`, bit b of word w being voxel z = 64 w + b. A flood voxel by voxel takes 20 to 50 times as long.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_ONE = np.uint64(1)
_TOP = np.uint64(63)


_MAX_STEPS = 3
"""From a sealed voxel to the one at the corner of a box: two voxels along its walls lie between them."""


@njit(cache=True)
def fill_enclosed(solid, surface, crossed):  # type: ignore[no-untyped-def]
    """Set in `solid` the voxels from which no path through faces of voxels leads outside past solid and surface.

    A voxel of the surface joins them if no face lies between its centre and theirs, by `crossed` (see `solid.fill_open`), unless
    as many centres outside are as near: where the surface has no gap this is exact, as everywhere else.
    """
    free = _free_rows(solid, surface)
    outside = _flood(free, solid.shape[2])
    sealed = free & ~outside
    if not sealed.any():
        return
    for x in range(free.shape[0]):
        for y in range(free.shape[1]):
            for w in range(free.shape[2]):
                if sealed[x, y, w] != 0:
                    for z in range(64 * w, min(64 * w + 64, solid.shape[2])):
                        if _has(sealed, x, y, z):
                            solid[x, y, z] = True
    _join_surface(sealed, outside, crossed, solid, surface)


@njit(cache=True)
def _join_surface(sealed, outside, crossed, solid, surface):  # type: ignore[no-untyped-def]
    places = _places(surface, solid)
    for _ in range(_MAX_STEPS):
        joins = np.zeros(len(places), np.bool_)
        for i in range(len(places)):
            x, y, z = places[i]
            joins[i] = not solid[x, y, z] and _balance(sealed, outside, crossed, x, y, z) > 0
        if not joins.any():
            return
        for x, y, z in places[joins]:
            solid[x, y, z] = True
            sealed[x, y, z // 64] |= _ONE << np.uint64(z % 64)


@njit(cache=True)
def _places(surface, solid):  # type: ignore[no-untyped-def]
    """(n, 3): the voxels of the surface that are not solid."""
    num = 0
    for x in range(surface.shape[0]):
        for y in range(surface.shape[1]):
            for z in range(surface.shape[2]):
                num += surface[x, y, z] and not solid[x, y, z]
    places = np.empty((num, 3), np.int64)
    num = 0
    for x in range(surface.shape[0]):
        for y in range(surface.shape[1]):
            for z in range(surface.shape[2]):
                if surface[x, y, z] and not solid[x, y, z]:
                    places[num, 0], places[num, 1], places[num, 2] = x, y, z
                    num += 1
    return places


@njit(cache=True)
def _balance(sealed, outside, crossed, x, y, z):  # type: ignore[no-untyped-def]
    """How many more of the six centres around, with no face before them, are sealed off than outside."""
    balance = 0
    for axis in range(3):
        for step in (-1, 1):
            i, j, k = x + step * (axis == 0), y + step * (axis == 1), z + step * (axis == 2)
            if not (0 <= i < crossed.shape[0] and 0 <= j < crossed.shape[1] and 0 <= k < crossed.shape[2]):
                continue
            first = crossed[min(x, i), min(y, j), min(z, k)]
            if not (first >> axis) & 1:
                balance += _has(sealed, i, j, k)
                balance -= _has(outside, i, j, k)
    return balance


@njit(cache=True)
def _has(rows, x, y, z):  # type: ignore[no-untyped-def]
    return (rows[x, y, z // 64] >> np.uint64(z % 64)) & _ONE != 0


@njit(cache=True)
def _free_rows(solid, surface):  # type: ignore[no-untyped-def]
    """The voxels that are neither, as words; bits past the grid are not free."""
    size = solid.shape
    free = np.zeros((size[0], size[1], (size[2] + 63) // 64), np.uint64)
    for x in range(size[0]):
        for y in range(size[1]):
            for w in range(free.shape[2]):
                word = np.uint64(0)
                for z in range(64 * w, min(64 * w + 64, size[2])):
                    word |= np.uint64(not (solid[x, y, z] or surface[x, y, z])) << np.uint64(z - 64 * w)
                free[x, y, w] = word
    return free


@njit(cache=True)
def _flood(free, size_z):  # type: ignore[no-untyped-def]
    """The free voxels that a path of free voxels joins to the border of the grid."""
    size_x, size_y, num_words = free.shape
    reached = np.zeros_like(free)
    is_queued = np.zeros((size_x, size_y), np.bool_)
    queue = np.empty(size_x * size_y, np.int64)  # a ring: each row is in it once at most
    head, length = 0, 0
    last = size_z - 1
    for x in range(size_x):
        for y in range(size_y):
            if x == 0 or y == 0 or x == size_x - 1 or y == size_y - 1:
                reached[x, y] = free[x, y]
            else:
                reached[x, y, 0] = free[x, y, 0] & _ONE
                reached[x, y, last // 64] |= free[x, y, last // 64] & (_ONE << np.uint64(last % 64))
            if reached[x, y].any():
                queue[length] = x * size_y + y
                is_queued[x, y] = True
                length += 1
    while length > 0:
        x, y = divmod(queue[head], size_y)
        head, length = (head + 1) % len(queue), length - 1
        is_queued[x, y] = False
        _spread(reached[x, y], free[x, y])
        for i, j in ((x - 1, y), (x + 1, y), (x, y - 1), (x, y + 1)):
            if not (0 <= i < size_x and 0 <= j < size_y):
                continue
            has_grown = False
            for w in range(num_words):
                new = reached[x, y, w] & free[i, j, w] & ~reached[i, j, w]
                if new != 0:
                    reached[i, j, w] |= new
                    has_grown = True
            if has_grown and not is_queued[i, j]:
                queue[(head + length) % len(queue)] = i * size_y + j
                is_queued[i, j] = True
                length += 1
    return reached


@njit(cache=True)
def _spread(row, free):  # type: ignore[no-untyped-def]
    """Let the set bits of a row grow along its free ones, both ways."""
    carry = np.uint64(0)
    for w in range(len(row)):
        row[w] = _grow_up(row[w] | (carry & free[w]), free[w])
        carry = row[w] >> _TOP
    carry = np.uint64(0)
    for w in range(len(row) - 1, -1, -1):
        row[w] = _grow_down(row[w] | ((carry << _TOP) & free[w]), free[w])
        carry = row[w] & _ONE


@njit(cache=True)
def _grow_up(word, free):  # type: ignore[no-untyped-def]
    """In six doublings (Kogge and Stone 1973): `free` keeps the bits with a run of free ones below them."""
    for step in (np.uint64(1), np.uint64(2), np.uint64(4), np.uint64(8), np.uint64(16), np.uint64(32)):
        word |= free & (word << step)
        free &= free << step
    return word


@njit(cache=True)
def _grow_down(word, free):  # type: ignore[no-untyped-def]
    for step in (np.uint64(1), np.uint64(2), np.uint64(4), np.uint64(8), np.uint64(16), np.uint64(32)):
        word |= free & (word >> step)
        free &= free >> step
    return word
