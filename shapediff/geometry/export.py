"""Cleaning a grid before it becomes a mesh, and writing meshes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from jaxtyping import Float, Int

from shapediff.errors import MeshError
from shapediff.files import replaced_file

if TYPE_CHECKING:
    import trimesh

MESH_SUFFIXES = (".obj", ".stl", ".ply", ".glb", ".3mf")

_IN_MILLIMETRES = (".stl", ".3mf")
"""What slicers read, as millimetres; the others are in metres."""


def units_a_metre(suffix: str) -> float:
    """How many units of the coordinates that `write_mesh` puts into such a file are a metre."""
    return 1000.0 if suffix.lower() in _IN_MILLIMETRES else 1.0


def remove_floaters(signal: Float[np.ndarray, "r r r"], *, min_fraction: float = 0.05) -> Float[np.ndarray, "r r r"]:
    """A copy of the signal without the parts smaller than `min_fraction` of its largest: they become outside (-1).

    A part is a set of inside voxels that touch by faces or edges, as in the surfaces made of it: a slanted leg is one part.
    """
    parts, sizes = _parts(signal)
    if len(sizes) < 3:
        return signal.copy()
    is_small = sizes < min_fraction * sizes.max()
    is_small[0] = False
    return np.where(is_small[parts], np.float32(-1), signal)


def largest_share(signal: Float[np.ndarray, "r r r"]) -> float:
    """The share of the inside voxels that the largest part holds: 1 for a shape in one part, 0 for an empty one."""
    _, sizes = _parts(signal)
    return float(sizes.max() / max(sizes.sum(), 1))


def _parts(signal: Float[np.ndarray, "r r r"]) -> tuple[Int[np.ndarray, "r r r"], Int[np.ndarray, " parts"]]:
    """(the number of each voxel's part, 0 outside; how many voxels each has, 0 for the outside)."""
    from scipy.ndimage import generate_binary_structure, label

    parts, _ = label(signal > 0, generate_binary_structure(3, 2))
    sizes = np.bincount(parts.ravel())
    sizes[0] = 0
    return parts, sizes


def fill_cavities(signal: Float[np.ndarray, "r r r"]) -> Float[np.ndarray, "r r r"]:
    """A copy of the signal whose hollows are inside (1): what cannot be reached through faces of voxels from the border."""
    from scipy.ndimage import label

    outside, num_regions = label(np.pad(signal <= 0, 1, constant_values=True))
    if num_regions < 2:
        return signal.copy()
    return np.where(outside[1:-1, 1:-1, 1:-1] > 1, np.float32(1), signal)  # region 1 holds the first voxel of the pad


def write_mesh(
    mesh: trimesh.Trimesh, path: str | Path, *, name: str | None = None, smooth_normals: bool = True
) -> None:
    """Write a mesh in metres as its suffix says (.obj, .stl, .ply, .glb, .3mf), beside its place first, then at once.

    .stl and .3mf are in millimetres, the unit that slicers assume; the others in metres. `name` is what viewers call it (.glb,
    .3mf; by default that of the file). A .glb carries vertex normals unless `smooth_normals` is False: viewers then shade it
    flat. Raises MeshError for another suffix.
    """
    import trimesh

    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in MESH_SUFFIXES:
        raise MeshError(
            f"{path.name}: cannot write {path.suffix or 'a file without suffix'}; use {', '.join(MESH_SUFFIXES)}"
        )
    mesh = trimesh.Trimesh(mesh.vertices * units_a_metre(suffix), mesh.faces, process=False)
    name = name or path.stem
    what: trimesh.Trimesh | trimesh.Scene = mesh
    options: dict[str, bool] = {}
    if suffix == ".obj":
        options = {"include_normals": False, "write_texture": False}
    elif suffix in (".glb", ".3mf"):
        what = trimesh.Scene()
        what.add_geometry(mesh, node_name=name, geom_name=name)
        options = {"include_normals": smooth_normals} if suffix == ".glb" else {}
    with replaced_file(path) as partial:
        what.export(partial, file_type=suffix[1:], **options)
