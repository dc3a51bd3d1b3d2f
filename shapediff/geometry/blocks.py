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
Vertices = Float[np.ndarray, "v 3"]
Faces = Int[np.ndarray, "f 3"]
Quads = Int[np.ndarray, "q 4"]


def block_surface(inside: Grid) -> tuple[Vertices, Faces]:
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
) -> tuple[Quads, Int[np.ndarray, "q 3"]]:
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


def _triangulated(vertices: Vertices, quads: Quads, outside: Int[np.ndarray, "q 3"]) -> tuple[Vertices, Faces]:
    """Two triangles a quad, but for quads with an edge that four share, both its ends being of one sheet."""
    edge = _edges(quads, len(vertices))
    _, inverse, counts = np.unique(edge, return_inverse=True, return_counts=True)
    is_shared = (counts[inverse] > 2).reshape(quads.shape)
    has_shared = is_shared.any(1)
    plain = quads[~has_shared]
    faces = [plain[:, [0, 1, 2]], plain[:, [0, 2, 3]]]
    if has_shared.any():
        vertices, split = _split_edges(vertices, quads[has_shared], outside[has_shared], is_shared[has_shared])
        faces += split
    return vertices, np.concatenate(faces)


def _edges(quads: Quads, num_vertices: int) -> Int[np.ndarray, "q 4"]:
    """A number for each edge of each quad, from corner k to the next, whichever way round."""
    following = np.roll(quads, -1, axis=1)
    return np.minimum(quads, following) * num_vertices + np.maximum(quads, following)


def _split_edges(
    vertices: Vertices, quads: Quads, outside: Int[np.ndarray, "q 3"], is_shared: Bool[np.ndarray, "q 4"]
) -> tuple[Vertices, list[Faces]]:
    """(vertices with more of them, faces): a shared edge gets a middle for each outside voxel at it, a quad a centre."""
    at, k = np.nonzero(is_shared)
    start, end = quads[at, k], quads[at, (k + 1) % 4]
    cell = np.ravel_multi_index(tuple((outside + 1).T), (int(outside.max()) + 2,) * 3)
    key = np.stack([_edges(quads, len(vertices))[at, k], cell[at]], axis=1)
    _, first, number = np.unique(key, axis=0, return_index=True, return_inverse=True)
    middle = (vertices[start[first]] + vertices[end[first]]) / 2
    towards = outside[at[first]] + 0.5 - middle
    middle = middle + GAP * np.where(np.abs(towards) > 0.25, np.sign(towards), 0)  # 0 along the edge itself
    middles = np.full(quads.shape, -1)
    middles[at, k] = len(vertices) + number.ravel()
    centres = len(vertices) + len(first) + np.arange(len(quads))
    faces = []
    for a, b, m in zip(quads.T, np.roll(quads, -1, axis=1).T, middles.T, strict=True):
        whole = m < 0
        faces.append(np.stack([a, b, centres], axis=1)[whole])
        faces += [np.stack([a, m, centres], axis=1)[~whole], np.stack([m, b, centres], axis=1)[~whole]]
    return np.concatenate([vertices, middle, vertices[quads].mean(1)]), faces
