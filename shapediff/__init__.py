"""shapediff: train a generator of 3D shapes on a folder of meshes, and sample closed, manifold meshes from it.

The names below are documented, typed and stable; each is loaded when it is first used, so that importing shapediff is quick
and needs neither a mesh library nor DeepSpeed.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shapediff.data.dataset import ShapeDataset
    from shapediff.geometry.isosurface import voxels_to_mesh
    from shapediff.geometry.mesh import load_mesh
    from shapediff.geometry.printable import MeshOptions
    from shapediff.geometry.voxelize import voxelize
    from shapediff.grid.morton import dense_to_morton, morton_decode, morton_encode, morton_to_dense
    from shapediff.pipeline import ShapePipeline
    from shapediff.shapes import Shapes

__version__ = "0.1.0"

_HOME = {
    "MeshOptions": "shapediff.geometry.printable",
    "ShapeDataset": "shapediff.data.dataset",
    "ShapePipeline": "shapediff.pipeline",
    "Shapes": "shapediff.shapes",
    "dense_to_morton": "shapediff.grid.morton",
    "load_mesh": "shapediff.geometry.mesh",
    "morton_decode": "shapediff.grid.morton",
    "morton_encode": "shapediff.grid.morton",
    "morton_to_dense": "shapediff.grid.morton",
    "voxelize": "shapediff.geometry.voxelize",
    "voxels_to_mesh": "shapediff.geometry.isosurface",
}

__all__ = [
    "MeshOptions",
    "ShapeDataset",
    "ShapePipeline",
    "Shapes",
    "dense_to_morton",
    "load_mesh",
    "morton_decode",
    "morton_encode",
    "morton_to_dense",
    "voxelize",
    "voxels_to_mesh",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'shapediff' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
