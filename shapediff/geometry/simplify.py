"""Fewer faces, and still closed."""

from __future__ import annotations

import numpy as np
from jaxtyping import Float, Int

Vertices = Float[np.ndarray, "v 3"]
Faces = Int[np.ndarray, "f 3"]

FLAT_WITHIN = 1e-4
"""Faces merge where that moves the surface by less than this, in voxels."""


def simplify_surface(vertices: Vertices, faces: Faces, *, max_faces: int) -> tuple[Vertices, Faces]:
    """(vertices, faces) of a closed mesh with at most `max_faces` faces, by quadric error (Garland and Heckbert 1997).

    libigl collapses an edge only where the mesh stays a manifold that does not cross itself; where that leaves more faces than
    asked for (parts and holes have a least number each), more they are.
    """
    import igl

    if len(faces) <= max_faces:
        return vertices, faces
    fewer, of, *_ = igl.qslim(
        np.asfortranarray(vertices, np.float64), np.asfortranarray(faces, np.int32), max_faces, True
    )
    return np.ascontiguousarray(fewer), np.ascontiguousarray(of, np.int64)


def merge_flat(vertices: Vertices, faces: Faces) -> tuple[Vertices, Faces]:
    """(vertices, faces) of a closed mesh with flat regions in few faces; the surface stays where it is."""
    import manifold3d

    solid = manifold3d.Manifold(
        manifold3d.Mesh64(np.ascontiguousarray(vertices, np.float64), np.ascontiguousarray(faces, np.uint64))
    )
    merged = solid.simplify(FLAT_WITHIN).to_mesh64()
    return np.array(merged.vert_properties[:, :3]), np.array(merged.tri_verts, np.int64)
