"""Mesh -> solid grid, whatever the mesh: open, in pieces, overlapping, inside out.

Each connected piece is solid on its own, and the shape is their union, since parity over a soup of pieces would cut out what
they share:

- A closed piece with consistent faces: where its winding number is not 0. Whether it is inside out does not matter, and a
  closed piece within another is no cavity.
- Any other piece, equal vertices and faces made one: crossings counted modulo 2 along all three axes, and the vote of two of
  them; a hole spoils one axis, and pores that scattered holes leave are filled. If much of what that calls solid has no surface
  near, the piece is a sheet (a car body).
- What encloses nothing piece by piece (six loose sides of a box): the same vote on all of it together; and whatever the
  surfaces of open pieces seal off is filled, exactly up to their faces.
- What is thinner than a voxel is kept where no voxel centre lies inside: a wall as one layer, anything else (legs, sheets)
  as the voxels that its surface passes through.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Float, Int, UInt8

from shapediff.errors import MeshError
from shapediff.geometry.kernels import distance, flood, pieces, solid
from shapediff.geometry.mesh import hash_rows, normalize_mesh

if TYPE_CHECKING:
    import trimesh

Corners = Float[np.ndarray, "v 3"]
Faces = Int[np.ndarray, "n 3"]
Triangles = Float[np.ndarray, "n 3 3"]
Grid = Bool[np.ndarray, "r r r"]

FLAT_BELOW = 1e-4
"""A mesh that is thinner than this part of its longest side, in whatever direction, holds no volume."""

TIE_BREAK = np.array([1.1e-4, 1.3e-4, 1.7e-4])
"""Added to every vertex, in voxels: a face exactly on a plane of voxel centres would come out ragged by rounding."""

SAME_VERTEX = 1e-4
"""Vertices of open pieces that round to the same multiple of this, in voxels, are one."""

MAX_BARE_BORDER, MIN_COVERED_SURFACE = 0.35, 0.5
"""When an open piece is a solid with holes and not a sheet; see `solid.fill_open`. Half a ball leaves 0.29 of its border
bare, a box without two opposite sides 0.26; a car body with open windows 0.46, a ball without a tenth of its faces 0.42 until
its pores are filled."""

SMALLEST_DISTANCE = 1e-6
"""No TSDF value is nearer to 0 than this, so that its sign tells the inside on the surface too."""


@dataclass(frozen=True)
class Solid:
    """`grid` (R, R, R) bool, and the `methods` that added to it, in this order:

    "winding" of closed pieces, "vote" of three axes on open pieces one by one, "joint vote" on what is left of them together,
    "flood": sealed off by surfaces, "thin": walls, legs and sheets thinner than a voxel.
    """

    grid: Grid
    methods: tuple[str, ...]


@dataclass(frozen=True)
class _Parts:
    """Triangles in voxels: all closed pieces together, and the open ones, piece p being open[starts[p]:starts[p + 1]]."""

    closed: Triangles
    open: Triangles
    starts: Int[np.ndarray, " p"]


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
        keep_thin: keep walls, legs and sheets thinner than a voxel, that no voxel centre lies in.

    Raises MeshError for a mesh without volume: flat, or with nothing that holds a voxel of this resolution.
    """
    if normalize:
        mesh, _ = normalize_mesh(mesh)
    found = find_solid(mesh, resolution=resolution, keep_thin=keep_thin)
    return found.grid if field == "occupancy" else signed_distance(mesh, found.grid, truncation=truncation)


def find_solid(mesh: trimesh.Trimesh, *, resolution: int, keep_thin: bool = True) -> Solid:
    """The solid of a mesh in unit-cube coordinates, and how it was found. Raises MeshError for a mesh without volume."""
    vertices, faces = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces, np.int64)
    _refuse_flat(vertices, faces)
    found = _solid(_parts((vertices + 0.5) * resolution + TIE_BREAK, faces), resolution, keep_thin)
    if not found.grid.any():
        raise MeshError(f"holds no voxel at resolution {resolution}: it is open, too thin or outside the cube")
    return found


def signed_distance(mesh: trimesh.Trimesh, inside: Grid, *, truncation: float) -> Float[np.ndarray, "r r r"]:
    """The TSDF, float32, of a mesh in unit-cube coordinates whose solid is known; see `voxelize`."""
    corners = (np.asarray(mesh.vertices, np.float64) + 0.5) * len(inside)
    return distance.signed_distance(corners[mesh.faces], inside, float(truncation), SMALLEST_DISTANCE)


def _refuse_flat(vertices: Corners, faces: Faces) -> None:
    """Along the axis of least variance, so that a sheet is found however it is turned."""
    is_used = np.zeros(len(vertices), bool)
    is_used[faces] = True
    used = vertices[is_used] - vertices[is_used].mean(0)
    _, axes = np.linalg.eigh(used.T @ used)
    sides = np.ptp(used @ axes, axis=0)
    if sides.min() < FLAT_BELOW * sides.max():
        raise MeshError(f"is flat: {sides.min():.3g} thick and {sides.max():.3g} long, so it holds no volume")


def _solid(parts: _Parts, resolution: int, keep_thin: bool) -> Solid:
    """Within the bounding box and a voxel around it: all that follows costs by the size of the grid."""
    grid = np.zeros((resolution,) * 3, bool)
    low, high = _box(parts, resolution)
    if (high <= low).any():
        return Solid(grid, ())
    within = grid[tuple(map(slice, low, high))]
    parts = _Parts(parts.closed - low, parts.open - low, parts.starts)
    inside, thin, surface = (np.zeros(within.shape, bool) for _ in range(3))
    methods = []
    if len(parts.closed):
        solid.fill_closed(parts.closed, _normals(parts.closed), inside, thin)
        methods.append("winding")
    if len(parts.open):
        crossed = np.zeros(within.shape, np.uint8)
        methods += _fill_open(parts, inside, thin, surface, crossed)
        methods += _if_it_grew(inside, "flood", lambda: flood.fill_enclosed(inside, surface, crossed))
    if keep_thin:
        methods += _if_it_grew(inside, "thin", lambda: _keep_thin(parts, inside, thin, surface))
    within[:] = inside
    return Solid(grid, tuple(methods))


def _box(parts: _Parts, resolution: int) -> tuple[Int[np.ndarray, "3"], Int[np.ndarray, "3"]]:
    corners = np.concatenate([triangles.reshape(-1, 3) for triangles in (parts.closed, parts.open)])
    low, high = (
        np.clip(np.floor(end), -2, resolution + 2).astype(np.int64) for end in (corners.min(0), corners.max(0))
    )
    return np.maximum(low - 1, 0), np.minimum(high + 2, resolution)


def _fill_open(
    parts: _Parts, inside: Grid, thin: Grid, surface: Grid, crossed: UInt8[np.ndarray, "r r r"]
) -> list[str]:
    """Each open piece by itself, and those that enclose nothing once more together; returns which of these held something."""
    normals = _normals(parts.open)
    limits = MAX_BARE_BORDER, MIN_COVERED_SURFACE
    encloses = solid.fill_open(parts.open, normals, parts.starts, *limits, inside, thin, surface, crossed)
    methods = ["vote"] if encloses.any() else []
    is_sheet = np.repeat(~encloses, np.diff(parts.starts))
    if is_sheet.any():
        together = np.array([0, is_sheet.sum()])
        if solid.fill_open(parts.open[is_sheet], normals[is_sheet], together, *limits, inside, thin, surface, crossed)[
            0
        ]:
            methods.append("joint vote")
    return methods


def _keep_thin(parts: _Parts, inside: Grid, thin: Grid, surface: Grid) -> None:
    solid.mark_surface(parts.closed, np.zeros(3, np.int64), surface)
    solid.keep_thin_walls(inside, thin)
    solid.keep_lost_surface(inside, surface)


def _if_it_grew(inside: Grid, method: str, add: Callable[[], None]) -> list[str]:
    before = np.count_nonzero(inside)
    add()
    return [method] if np.count_nonzero(inside) > before else []


def _parts(corners: Corners, faces: Faces) -> _Parts:
    """Closed pieces as they are; the rest once more with equal vertices and equal faces made one."""
    piece, is_closed = _closed_pieces(faces, len(corners))
    closed = [_outward(corners[faces[is_closed]], piece[is_closed])]
    faces = faces[~is_closed]
    if not len(faces):
        return _Parts(closed[0], np.empty((0, 3, 3)), np.zeros(1, np.int64))
    corners, faces = _made_one(corners, faces)
    piece, is_closed = _closed_pieces(faces, len(corners))
    closed.append(_outward(corners[faces[is_closed]], piece[is_closed]))
    order = np.flatnonzero(~is_closed)[np.argsort(piece[~is_closed], kind="stable")]
    starts = np.r_[0, np.flatnonzero(np.diff(piece[order])) + 1, len(order)] if len(order) else np.zeros(1, np.int64)
    return _Parts(np.concatenate(closed), corners[faces[order]], starts)


def _closed_pieces(faces: Faces, num_vertices: int) -> tuple[Int[np.ndarray, " n"], Bool[np.ndarray, " n"]]:
    """(piece of each face, whether that piece is closed: each edge is shared by two faces that run through it both ways)."""
    piece, num_pieces = pieces.connected_pieces(faces, num_vertices)
    is_open = np.zeros(num_pieces, bool)
    is_open[piece[pieces.has_open_edge(faces, num_vertices)]] = True
    return piece, ~is_open[piece]


def _made_one(corners: Corners, faces: Faces) -> tuple[Corners, Faces]:
    """Without equal vertices, faces without area and faces said twice, whichever way round."""
    used, local = np.unique(faces, return_inverse=True)
    _, first, inverse = np.unique(
        hash_rows(np.round(corners[used] / SAME_VERTEX)), return_index=True, return_inverse=True
    )
    faces = inverse[local].reshape(-1, 3)
    ordered = np.sort(faces, axis=1)
    is_proper = (ordered[:, 0] != ordered[:, 1]) & (ordered[:, 1] != ordered[:, 2])
    _, kept = np.unique(hash_rows(ordered[is_proper]), return_index=True)
    return corners[used][first], faces[is_proper][np.sort(kept)]


def _outward(triangles: Triangles, piece: Int[np.ndarray, " n"]) -> Triangles:
    """Each closed piece turned so that its volume is positive."""
    if not len(triangles):
        return triangles
    a, b, c = (triangles[:, i] - triangles[0, 0] for i in range(3))
    volume = np.bincount(piece, np.einsum("ni,ni->n", a, np.cross(b, c)))
    is_inverted = (volume < 0)[piece]
    triangles[is_inverted] = triangles[is_inverted][:, ::-1]
    return triangles


def _normals(triangles: Triangles) -> Float[np.ndarray, "n 3"]:
    """Unit normals; 0 for a triangle without area."""
    normals = np.cross(triangles[:, 1] - triangles[:, 0], triangles[:, 2] - triangles[:, 0])
    return normals / np.maximum(np.linalg.norm(normals, axis=1, keepdims=True), 1e-300)
