"""Grid -> mesh of cubes: the exposed faces of voxels, closed and manifold also where voxels touch by an edge or a corner.

Around a corner of voxels lie eight of them, and the surface there may be several sheets: each gets a vertex of its own. Voxels
that touch by an edge hold together by a thin neck, voxels that touch by a corner only are apart, as the smooth surface has it;
sheets that would meet are moved apart by `GAP`, so that files without shared vertices (STL) say the same.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import product

import numpy as np
from jaxtyping import Bool, Float, Int

GAP = 0.1
"""How far sheets that meet are moved, in voxels, along each axis."""

Grid = Bool[np.ndarray, "r r r"]


def block_surface(inside: Grid) -> tuple[Float[np.ndarray, "v 3"], Int[np.ndarray, "f 3"]]:
    """(vertices in voxels, faces) of the voxels that are inside; voxel (i, j, k) is the cube [i, i + 1] x [j, j + 1] x ..."""
    padded = np.pad(inside, 1)
    codes = _codes(padded)
    num_sheets, sheet_of, shift = _sheets()
    counts = num_sheets[codes]
    first = np.cumsum(counts.ravel()).reshape(counts.shape) - counts
    quads, outside = _quads(padded, codes, first, sheet_of)
    corners = np.argwhere(counts)
    at = counts[tuple(corners.T)]
    number = np.arange(at.sum()) - np.repeat(np.cumsum(at) - at, at)
    vertices = np.repeat(corners, at, axis=0) + shift[np.repeat(codes[tuple(corners.T)], at), number]
    return _triangulated(vertices, quads, outside)


def _codes(padded: Grid) -> Int[np.ndarray, "p p p"]:
    """Of each corner of voxels, a bit for each of the eight around: bit dx + 2 dy + 4 dz is the voxel on those sides."""
    side = len(padded) - 1
    codes = np.zeros((side,) * 3, np.uint8)
    for dx, dy, dz in product((0, 1), repeat=3):
        voxels = padded[dx : dx + side, dy : dy + side, dz : dz + side]
        codes |= voxels.view(np.uint8) << np.uint8(dx + 2 * dy + 4 * dz)
    return codes


@lru_cache(maxsize=1)
def _sheets() -> tuple[Int[np.ndarray, "256"], Int[np.ndarray, "256 3 8"], Float[np.ndarray, "256 4 3"]]:
    """Of each code: the number of sheets, the sheet of the face between voxels k and k + 2^axis, where its vertex moves."""
    num_sheets, sheet_of, shift = np.zeros(256, np.int64), np.zeros((256, 3, 8), np.int64), np.zeros((256, 4, 3))
    for code in range(1, 255):
        sheets = _sheets_of(code)
        num_sheets[code] = len(sheets)
        for number, sheet in enumerate(sheets):
            for axis, k in sheet:
                sheet_of[code, axis, k] = number
            if len(sheets) > 1:
                shift[code, number] = GAP * np.sign(_own_side(code, sheet))
    return num_sheets, sheet_of, shift


def _sheets_of(code: int) -> list[list[tuple[int, int]]]:
    """Faces (axis, k) around a corner, joined along the six edges there: of four at an edge, those of one outside voxel."""
    faces = [(a, k) for a in range(3) for k in range(8) if not k >> a & 1 and (code >> k ^ code >> (k | 1 << a)) & 1]
    sheets = [[face] for face in faces]
    for edge, end in product(range(3), (0, 1)):
        around = [face for face in faces if face[0] != edge and face[1] >> edge & 1 == end]
        for one, other in product(around, around):
            if len(around) == 2 or _outside_voxel(code, one) == _outside_voxel(code, other):
                sheets = _joined(sheets, one, other)
    return sheets


def _joined(sheets: list[list[tuple[int, int]]], one: tuple[int, int], other: tuple[int, int]) -> list:
    a, b = (next(sheet for sheet in sheets if face in sheet) for face in (one, other))
    return sheets if a is b else [sheet for sheet in sheets if sheet is not a and sheet is not b] + [a + b]


def _outside_voxel(code: int, face: tuple[int, int]) -> int:
    axis, k = face
    return k | 1 << axis if code >> k & 1 else k


def _own_side(code: int, sheet: list[tuple[int, int]]) -> Float[np.ndarray, "3"]:
    """The direction of the voxels that a sheet alone cuts off from the eight: all inside, or all outside."""
    cut = set(sheet)
    side = {0}
    while grown := {
        k ^ 1 << a for k in side for a in range(3) if (a, k & ~(1 << a)) not in cut and k ^ 1 << a not in side
    }:
        side |= grown
    sides = (side, set(range(8)) - side)
    own = min(sides, key=lambda ks: (len({code >> k & 1 for k in ks}), len(ks)))
    return np.mean([[(k >> a & 1) - 0.5 for a in range(3)] for k in own], axis=0)


def _quads(
    padded: Grid, codes: np.ndarray, first: np.ndarray, sheet_of: np.ndarray
) -> tuple[Int[np.ndarray, "q 4"], Int[np.ndarray, "q 3"]]:
    """(vertices of each exposed face, counter-clockwise seen from outside; the voxel outside it, in the unpadded grid)."""
    quads, outside = [], []
    for axis in range(3):
        ahead = [slice(None)] * 3
        behind = list(ahead)
        ahead[axis], behind[axis] = slice(1, None), slice(None, -1)
        low, high = padded[tuple(behind)], padded[tuple(ahead)]
        voxel = np.argwhere(low != high)
        looks_up = low[tuple(voxel.T)]
        b, c = (axis + 1) % 3, (axis + 2) % 3
        ring = []
        for sb, sc in ((0, 0), (1, 0), (1, 1), (0, 1)):
            # Corner i lies between voxels i and i + 1 of the padded grid.
            corner = voxel.copy()
            corner[:, b] += sb - 1
            corner[:, c] += sc - 1
            k = (1 - sb << b) + (1 - sc << c)
            at = tuple(corner.T)
            ring.append(first[at] + sheet_of[codes[at], axis, k])
        quad = np.stack(ring, axis=1)
        quads.append(np.where(looks_up[:, None], quad, quad[:, ::-1]))
        voxel[:, axis] += looks_up
        outside.append(voxel - 1)
    return np.concatenate(quads), np.concatenate(outside)


def _triangulated(
    vertices: Float[np.ndarray, "v 3"], quads: Int[np.ndarray, "q 4"], outside: Int[np.ndarray, "q 3"]
) -> tuple[Float[np.ndarray, "w 3"], Int[np.ndarray, "f 3"]]:
    """Two triangles a quad. An edge that four quads share, its ends being single, is split: a middle for each outside voxel."""
    start, end = quads, np.roll(quads, -1, axis=1)
    edge = np.minimum(start, end) * len(vertices) + np.maximum(start, end)
    _, inverse, counts = np.unique(edge, return_inverse=True, return_counts=True)
    is_split = (counts[inverse] > 2).reshape(quads.shape)
    is_plain = ~is_split.any(1)
    plain = quads[is_plain]
    faces = [plain[:, [0, 1, 2]], plain[:, [0, 2, 3]]]
    if is_plain.all():
        return vertices, np.concatenate(faces)
    side = len(vertices) + 2
    place = np.ravel_multi_index(tuple((outside + 1).T), (side,) * 3)  # the outside voxel of each quad
    key = np.stack([edge[is_split], np.broadcast_to(place[:, None], quads.shape)[is_split]], axis=1)
    _, where, number = np.unique(key, axis=0, return_index=True, return_inverse=True)
    ends = start[is_split][where], end[is_split][where]
    middle = (vertices[ends[0]] + vertices[ends[1]]) / 2
    cell = np.broadcast_to(outside[:, None], (*quads.shape, 3))[is_split][where] + 0.5
    away = np.where(np.abs(cell - middle) > 0.25, np.sign(cell - middle), 0)
    middles = np.full(quads.shape, -1)
    middles[is_split] = len(vertices) + number.ravel()
    halved = np.flatnonzero(~is_plain)
    centre = len(vertices) + len(where) + np.arange(len(halved))
    centres = vertices[quads[halved]].mean(1)
    for k in range(4):
        a, b, m = start[halved, k], end[halved, k], middles[halved, k]
        whole = m < 0
        faces += [
            np.stack([a, b, centre], 1)[whole],
            np.stack([a, m, centre], 1)[~whole],
            np.stack([m, b, centre], 1)[~whole],
        ]
    return np.concatenate([vertices, middle + GAP * away, centres]), np.concatenate(faces)
