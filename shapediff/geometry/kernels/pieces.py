"""Which faces belong together, and where a surface is open."""

from __future__ import annotations

import numpy as np
from numba import njit


@njit(cache=True)
def connected_pieces(faces, num_vertices):  # type: ignore[no-untyped-def]
    """(number of the piece of each face (n,), number of pieces): faces that share a vertex are of one piece."""
    parent = np.arange(num_vertices)
    for n in range(len(faces)):
        root = _root(parent, faces[n, 0])
        for c in range(1, 3):
            parent[_root(parent, faces[n, c])] = root
    names = np.full(num_vertices, -1)
    piece = np.empty(len(faces), np.int64)
    count = 0
    for n in range(len(faces)):
        root = _root(parent, faces[n, 0])
        if names[root] < 0:
            names[root] = count
            count += 1
        piece[n] = names[root]
    return piece, count


@njit(cache=True)
def _root(parent, i):  # type: ignore[no-untyped-def]
    while parent[i] != i:
        parent[i] = parent[parent[i]]
        i = parent[i]
    return i


@njit(cache=True)
def has_open_edge(faces, num_vertices):  # type: ignore[no-untyped-def]
    """Which faces (n,) have an edge that is not shared with exactly one other face, run through the opposite way."""
    num_edges = 3 * len(faces)
    small, large = np.empty(num_edges, np.int64), np.empty(num_edges, np.int64)
    for e in range(num_edges):
        a, b = faces[e // 3, e % 3], faces[e // 3, (e + 1) % 3]
        small[e], large[e] = min(a, b), max(a, b)
    # Two stable counting sorts bring the same edges together in linear time.
    order = _counting_sort(_counting_sort(np.arange(num_edges), large, num_vertices), small, num_vertices)
    is_open = np.zeros(len(faces), np.bool_)
    first = 0
    while first < num_edges:
        last = first + 1
        while (
            last < num_edges and small[order[last]] == small[order[first]] and large[order[last]] == large[order[first]]
        ):
            last += 1
        e, f = order[first], order[last - 1]
        if last - first != 2 or faces[e // 3, e % 3] == faces[f // 3, f % 3]:
            for i in range(first, last):
                is_open[order[i] // 3] = True
        first = last
    return is_open


@njit(cache=True)
def _counting_sort(order, keys, num_keys):  # type: ignore[no-untyped-def]
    place = np.zeros(num_keys + 1, np.int64)
    for i in order:
        place[keys[i] + 1] += 1
    for k in range(num_keys):
        place[k + 1] += place[k]
    result = np.empty_like(order)
    for i in order:
        result[place[keys[i]]] = i
        place[keys[i]] += 1
    return result
