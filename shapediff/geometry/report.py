"""What a mesh is, measured: closed, manifold, its parts, its size."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from shapediff.geometry.mesh import hash_rows

if TYPE_CHECKING:
    import trimesh

Vertices = Float[np.ndarray, "v 3"]
Faces = Int[np.ndarray, "f 3"]

GRAIN = 1e-7
"""Vertices that round to the same multiple of this, in longest sides of the mesh, are one, as in a file of float32."""


@dataclass(frozen=True)
class MeshReport:
    """Facts about a mesh, after vertices at the same place were made one, as any reader of a file may.

    `closed`: each edge lies in exactly two faces, which run through it in opposite directions. `manifold`: also, the faces
    around each vertex are one fan. `degenerate` counts faces without height, `crossing` those that pass through others.
    `parts` counts surfaces that look outward, `cavities` those that look inward. `volume`, `area` and `size` (x, y, z) are in
    the units of the mesh: metres, in what shapediff writes into a manifest.
    """

    closed: bool
    manifold: bool
    degenerate: int
    crossing: int
    parts: int
    cavities: int
    faces: int
    volume: float
    area: float
    size: tuple[float, float, float]

    @property
    def is_printable(self) -> bool:
        """Closed, manifold, outward, nothing degenerate, nothing that crosses itself."""
        return self.closed and self.manifold and self.volume > 0 and not self.degenerate and not self.crossing

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "size": list(self.size)}


def check_mesh(mesh: trimesh.Trimesh) -> MeshReport:
    """Measure a mesh with at least one face."""
    return check_surface(np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces, np.int64))


def check_surface(vertices: Vertices, faces: Faces) -> MeshReport:
    """Measure a surface of at least one face; see MeshReport."""
    from shapediff.geometry.kernels.crossing import crossing_faces

    used = vertices[np.unique(faces)]
    size = np.ptp(used, axis=0)
    grain = GRAIN * max(float(size.max()), 1e-300)
    _, first, one = np.unique(
        hash_rows(np.round((vertices - used.min(0)) / grain)), return_index=True, return_inverse=True
    )
    vertices, faces = vertices[first], one[faces]
    a, b, c = (vertices[faces[:, i]] for i in range(3))
    doubled = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    longest = np.linalg.norm(np.stack([b - a, c - b, a - c]), axis=2).max(0)
    piece = _pieces(faces, len(vertices))
    centre = used.mean(0)
    volumes = np.bincount(piece, np.einsum("fi,fi->f", a - centre, np.cross(b - centre, c - centre)) / 6)
    is_closed = _is_closed(faces, len(vertices))
    return MeshReport(
        closed=is_closed,
        manifold=is_closed and _fans(faces, len(vertices)) == len(np.unique(faces)),
        degenerate=int((doubled <= grain * longest).sum()),
        crossing=int(crossing_faces(vertices, faces).sum()),
        parts=int((volumes > 0).sum()),
        cavities=int((volumes <= 0).sum()),
        faces=len(faces),
        volume=float(volumes.sum()),
        area=float(doubled.sum() / 2),
        size=(float(size[0]), float(size[1]), float(size[2])),
    )


def _is_closed(faces: Faces, num_vertices: int) -> bool:
    """Whether each directed edge is there once, and so is the one the other way."""
    start, end = faces.ravel(), faces[:, [1, 2, 0]].ravel()
    edges, back = np.sort(start * num_vertices + end), np.sort(end * num_vertices + start)
    return bool((edges[1:] != edges[:-1]).all() and (edges == back).all())


def _pieces(faces: Faces, num_vertices: int) -> Int[np.ndarray, " f"]:
    """The connected piece of each face, numbered from 0."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    start, end = faces.ravel(), faces[:, [1, 2, 0]].ravel()
    graph = coo_array((np.ones(len(start), np.int8), (start, end)), shape=(num_vertices, num_vertices))
    _, piece = connected_components(graph, directed=False)
    return np.unique(piece[faces[:, 0]], return_inverse=True)[1]


def _fans(faces: Faces, num_vertices: int) -> int:
    """Of a closed surface: how many fans of faces there are around vertices; one a vertex if it is a manifold there."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    num = faces.size
    corner = np.arange(num).reshape(-1, 3)
    start, end = faces.ravel(), faces[:, [1, 2, 0]].ravel()
    # Edge i runs from corner i to the next of its face; the edge back, in another face, the other way round.
    forward, back = np.argsort(start * num_vertices + end), np.argsort(end * num_vertices + start)
    following = corner[:, [1, 2, 0]].ravel()
    graph = coo_array((np.ones(num, np.int8), (forward, following[back])), shape=(num, num))
    return int(connected_components(graph, directed=False, return_labels=False))
