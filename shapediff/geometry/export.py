"""Cleaning a grid before it becomes a mesh, and writing meshes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float

from shapediff.errors import MeshError
from shapediff.files import replaced_file

if TYPE_CHECKING:
    import trimesh

MESH_SUFFIXES = (".obj", ".stl", ".ply", ".glb")


def remove_floaters(signal: Float[np.ndarray, "r r r"], *, min_fraction: float = 0.05) -> Float[np.ndarray, "r r r"]:
    """A copy of the signal without the parts smaller than `min_fraction` of its largest: they become outside (-1).

    A part is a set of inside voxels that touch by faces.
    """
    from scipy.ndimage import label

    parts, num_parts = label(signal > 0)
    if num_parts < 2:
        return signal.copy()
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    is_small = sizes < min_fraction * sizes.max()
    is_small[0] = False
    return np.where(is_small[parts], np.float32(-1), signal)


def write_mesh(mesh: trimesh.Trimesh, path: str | Path) -> None:
    """Write a mesh as its suffix says (.obj, .stl, .ply, .glb), beside its place first, then at once.

    Raises MeshError for another suffix.
    """
    path = Path(path)
    if path.suffix.lower() not in MESH_SUFFIXES:
        raise MeshError(
            f"{path.name}: cannot write {path.suffix or 'a file without suffix'}; use {', '.join(MESH_SUFFIXES)}"
        )
    options = {"include_normals": False, "write_texture": False} if path.suffix.lower() == ".obj" else {}
    with replaced_file(path) as partial:
        mesh.export(partial, file_type=path.suffix.lower()[1:], **options)
