"""Mesh -> solid grid, whatever the mesh: open, in pieces, overlapping, inside out.

Each connected piece is solid on its own, and the shape is their union, since parity over a soup of pieces would cut out what
they share:

- A closed piece with consistent faces: the winding number along lines through the voxel centres, its orientation put right.
- Any other piece: crossings counted modulo 2 along all three axes, and the vote of two of them; a hole spoils one axis.
- Pieces that hold nothing by themselves (six loose sheets of a box): the same vote on all of them together; and whatever
  surfaces enclose is filled.
- What is thinner than a voxel, and so has no voxel centre inside, keeps the voxels that its surface passes through.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Float, Int

from shapediff.errors import MeshError
from shapediff.geometry.kernels import banded_distance, column_crossings, mark_surface
from shapediff.geometry.mesh import normalize_mesh

if TYPE_CHECKING:
    import trimesh

Triangles = Float[np.ndarray, "n 3 3"]

FLAT_BELOW = 1e-4
"""A mesh whose shortest side is a smaller part of its longest than this holds no volume."""

TIE_BREAK = np.array([1.1e-4, 1.3e-4, 1.7e-4])
"""Added to every vertex, in voxels: a face exactly on a plane of voxel centres would come out ragged by rounding."""

MAX_OPEN_PIECES = 256
"""Open pieces beyond this many, the largest first, are taken as one: a soup of loose triangles is no list of parts."""


def voxelize(
    mesh: trimesh.Trimesh,
    *,
    resolution: int = 64,
    field: Literal["occupancy", "tsdf"] = "occupancy",
    truncation: float = 3.0,
    normalize: bool = True,
    keep_thin: bool = True,
) -> Bool[np.ndarray, "r r r"] | Float[np.ndarray, "r r r"]:
    """The solid of a mesh as a grid (R, R, R), index order (x, y, z).

    A voxel is inside if its centre is, so a surface lies within half a voxel of where the mesh has it.

    Args:
        field: "occupancy" gives booleans; "tsdf" float32 in [-1, 1], the distance to the surface over `truncation` voxels,
            negative inside, exact where it is not cut off.
        normalize: place the mesh in the cube as data sets do (see `normalize_mesh`); else its unit-cube coordinates count,
            and what lies outside the cube is cut off.
        keep_thin: keep what is thinner than a voxel, as the voxels that its surface passes through.

    Raises MeshError for a mesh without volume.
    """
    if normalize:
        mesh, _ = normalize_mesh(mesh)
    extents = np.ptp(mesh.vertices[np.unique(mesh.faces)], axis=0)
    if extents.min() < FLAT_BELOW * extents.max():
        raise MeshError(f"is flat: its sides are {', '.join(f'{side:.3g}' for side in extents)}, so it holds no volume")
    corners = np.ascontiguousarray((np.asarray(mesh.vertices) + 0.5) * resolution + TIE_BREAK)
    solid, kept = _solid(corners, np.asarray(mesh.faces), resolution, keep_thin)
    if field == "occupancy":
        return solid | kept
    return _tsdf(corners[mesh.faces], solid | kept, truncation)


def _solid(
    corners: Float[np.ndarray, "v 3"], faces: Int[np.ndarray, "n 3"], resolution: int, keep_thin: bool
) -> tuple[Bool[np.ndarray, "r r r"], Bool[np.ndarray, "r r r"]]:
    """(voxels with their centre inside, voxels kept for what is thinner than that)."""
    closed, open_pieces = _pieces(corners, faces)
    solid = _winding(closed, resolution) > 0
    votes = [_vote(piece, resolution) for piece in open_pieces]
    for vote in votes:
        solid |= vote
    sheets = [piece for piece, vote in zip(open_pieces, votes, strict=True) if not vote.any()]
    if sheets:
        solid |= _vote(np.concatenate(sheets), resolution)
    if open_pieces:
        solid |= _enclosed(solid, _surface(open_pieces, resolution))
    if not keep_thin:
        return solid, np.zeros_like(solid)
    return solid, _thin(solid, _surface([closed, *open_pieces], resolution))


def _pieces(corners: Float[np.ndarray, "v 3"], faces: Int[np.ndarray, "n 3"]) -> tuple[Triangles, list[Triangles]]:
    """All closed pieces together, each turned outward, and the others one by one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    num_vertices = len(corners)
    links = coo_array((np.ones(2 * len(faces), bool), (np.r_[faces[:, 0], faces[:, 1]], np.r_[faces[:, 1], faces[:, 2]])),
                      shape=(num_vertices, num_vertices))  # fmt: skip
    _, piece_of_vertex = connected_components(links, directed=False)
    _, piece = np.unique(piece_of_vertex[faces[:, 0]], return_inverse=True)
    num_pieces = int(piece.max()) + 1
    triangles = corners[faces]

    # Closed and consistent: every directed edge occurs once, and its opposite too.
    start, end = faces.ravel(), faces[:, [1, 2, 0]].ravel()
    edges, opposite = start * num_vertices + end, end * num_vertices + start
    unique, counts = np.unique(edges, return_counts=True)
    is_paired = (counts[np.searchsorted(unique, edges)] == 1) & np.isin(opposite, unique, assume_unique=False)
    is_closed = np.bincount(np.repeat(piece, 3)[~is_paired], minlength=num_pieces) == 0

    middle = triangles.mean((0, 1))
    a, b, c = (triangles[:, i] - middle for i in range(3))
    volume = np.bincount(piece, np.einsum("ni,ni->n", a, np.cross(b, c)), minlength=num_pieces)
    is_inverted = (volume < 0)[piece]
    triangles = np.where(is_inverted[:, None, None], triangles[:, ::-1], triangles)

    closed = np.ascontiguousarray(triangles[is_closed[piece]])
    rest, piece = triangles[~is_closed[piece]], piece[~is_closed[piece]]
    order = np.argsort(-np.bincount(piece, minlength=num_pieces), kind="stable")
    rank = np.empty(num_pieces, np.int64)
    rank[order] = np.arange(num_pieces)
    rank = np.minimum(rank[piece], MAX_OPEN_PIECES)
    return closed, [np.ascontiguousarray(rest[rank == r]) for r in np.unique(rank)]


def _winding(triangles: Triangles, resolution: int) -> Int[np.ndarray, "r r r"]:
    """How many outward-oriented pieces each voxel centre lies in."""
    crossings = np.zeros((resolution, resolution, resolution + 1), np.int32)
    column_crossings(triangles, 2, crossings)
    return crossings[:, :, :-1].cumsum(2)


def _vote(triangles: Triangles, resolution: int) -> Bool[np.ndarray, "r r r"]:
    """Where at least two of three axes have an odd number of crossings on the way to a voxel centre."""
    votes = np.zeros((resolution, resolution, resolution), np.int8)
    for axis in range(3):
        crossings = np.zeros((resolution, resolution, resolution + 1), np.int32)
        column_crossings(triangles, axis, crossings)
        is_odd = (crossings[:, :, :-1].cumsum(2) & 1).astype(np.int8)
        # A line that never comes out again went in through a hole: it says nothing.
        is_odd[(crossings.sum(2) & 1) == 1] = 0
        votes += np.moveaxis(is_odd, (0, 1, 2), ((axis + 1) % 3, (axis + 2) % 3, axis))
    return votes >= 2


def _surface(pieces: list[Triangles], resolution: int) -> Bool[np.ndarray, "r r r"]:
    surface = np.zeros((resolution, resolution, resolution), bool)
    for piece in pieces:
        mark_surface(piece, surface)
    return surface


def _enclosed(solid: Bool[np.ndarray, "r r r"], surface: Bool[np.ndarray, "r r r"]) -> Bool[np.ndarray, "r r r"]:
    """The empty voxels from which no path of faces leads outside past solid and surface."""
    from scipy.ndimage import binary_fill_holes

    wall = solid | surface
    return binary_fill_holes(wall) & ~wall


def _thin(solid: Bool[np.ndarray, "r r r"], surface: Bool[np.ndarray, "r r r"]) -> Bool[np.ndarray, "r r r"]:
    """The surface voxels with no solid around them, and those beside them, so that a leg stays on its chair."""
    from scipy.ndimage import binary_dilation

    around = np.ones((3, 3, 3), bool)
    lost = surface & ~binary_dilation(solid, around)
    return surface & ~solid & binary_dilation(lost, around) if lost.any() else lost


def _tsdf(triangles: Triangles, inside: Bool[np.ndarray, "r r r"], truncation: float) -> Float[np.ndarray, "r r r"]:
    squared = np.full(inside.shape, truncation**2, np.float32)
    banded_distance(np.ascontiguousarray(triangles), truncation, squared)
    distance = np.sqrt(squared) / np.float32(truncation)
    return np.where(inside, -distance, distance)
