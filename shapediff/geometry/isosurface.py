"""Grid -> mesh: marching cubes on the padded field, always closed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Float

from shapediff.errors import MeshError
from shapediff.geometry.smoothing import smooth_surface

if TYPE_CHECKING:
    import trimesh

FieldKind = Literal["signal", "occupancy", "tsdf"]

# (value of the surface, factor that maps the inside to (0, 1] and the outside to [-1, 0))
_SURFACE: dict[str, tuple[float, float]] = {"signal": (0.0, 1.0), "occupancy": (0.5, 2.0), "tsdf": (0.0, -1.0)}

DEFAULT_SMOOTHING = 12
NEAREST_TO_SURFACE = 0.02
"""Values nearer to the surface than this are moved to this: a vertex on a grid point makes faces of no area."""


def voxels_to_mesh(
    voxels: Float[np.ndarray, "r r r"] | Bool[np.ndarray, "r r r"],
    *,
    field: FieldKind = "signal",
    smooth: int = DEFAULT_SMOOTHING,
) -> trimesh.Trimesh:
    """The surface of a grid as a closed manifold mesh, oriented outward, in unit-cube coordinates, y up.

    Voxels that touch by an edge hold together, as slanted legs need; voxels that touch by a corner only are apart.

    Args:
        voxels: (R, R, R), index order (x, y, z); voxel i has its centre at (i + 0.5) / R - 0.5. Booleans are occupancy.
        field: where the inside is: "signal" above 0, "occupancy" above 0.5, "tsdf" below 0.
        smooth: iterations of smoothing, which rounds the steps of a binary grid and keeps volume and thickness.

    Raises MeshError for another shape, values that are not finite, or a grid without any inside.
    """
    import trimesh
    from skimage.measure import marching_cubes

    inside = positive_inside(np.asarray(voxels), field)
    # One layer of outside all around: whatever touches the border is closed there.
    padded = np.pad(inside, 1, constant_values=-1.0)
    # The variant of Lorensen and Cline (1987): that of Lewiner left open edges on 9 of 20 grids of random signs, this one none.
    # It parts the high values where two of them face each other across a square; of the negated field, the outside.
    vertices, faces, *_ = marching_cubes(-padded, 0.0, method="lorensen", allow_degenerate=False)
    vertices, faces = vertices.astype(np.float64), faces.astype(np.int64)
    if smooth:
        vertices = smooth_surface(vertices, faces, iterations=smooth)
    # The pad moved voxel 0 to index 1.
    return trimesh.Trimesh((vertices - 1 + 0.5) / len(inside) - 0.5, faces, process=False)


def positive_inside(voxels: np.ndarray, field: str = "signal") -> Float[np.ndarray, "r r r"]:
    """The grid as values in [-1, 1], positive inside, none nearer to 0 than NEAREST_TO_SURFACE; raises as `voxels_to_mesh`."""
    if voxels.ndim != 3 or len(set(voxels.shape)) != 1 or not voxels.size:
        raise MeshError(f"expected a grid (R, R, R), found {voxels.shape}")
    if voxels.dtype == bool:
        field = "occupancy"
    if field not in _SURFACE:
        raise MeshError(f"field={field!r} is unknown; use one of {', '.join(_SURFACE)}")
    level, factor = _SURFACE[field]
    inside = factor * (voxels.astype(np.float32) - level)
    if not np.isfinite(inside).all():
        raise MeshError("the grid holds values that are not finite")
    if not (inside > 0).any():
        raise MeshError("the grid is empty: no voxel lies inside")
    signs = np.where(inside > 0, 1.0, -1.0).astype(np.float32)
    return signs * np.clip(np.abs(inside), NEAREST_TO_SURFACE, 1.0)
