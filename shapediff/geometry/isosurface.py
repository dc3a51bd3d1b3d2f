"""Grid -> mesh: marching cubes on the padded field, always closed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Float

from shapediff.errors import MeshError

if TYPE_CHECKING:
    import trimesh

FieldKind = Literal["signal", "occupancy", "tsdf"]

# (value of the surface, factor that maps the inside to (0, 1] and the outside to [-1, 0))
_SURFACE: dict[str, tuple[float, float]] = {"signal": (0.0, 1.0), "occupancy": (0.5, 2.0), "tsdf": (0.0, -1.0)}

DEFAULT_SMOOTHING = 12
NEAREST_TO_SURFACE = 1e-3
"""Values nearer to the surface than this are moved to this: a vertex on a grid point makes faces of no area."""


def voxels_to_mesh(
    voxels: Float[np.ndarray, "r r r"] | Bool[np.ndarray, "r r r"],
    *,
    field: FieldKind = "signal",
    smooth: int = DEFAULT_SMOOTHING,
) -> trimesh.Trimesh:
    """The surface of a grid as a closed mesh, oriented outward, in unit-cube coordinates, y up.

    Args:
        voxels: (R, R, R), index order (x, y, z); voxel i has its centre at (i + 0.5) / R - 0.5. Booleans are occupancy.
        field: where the inside is: "signal" above 0, "occupancy" above 0.5, "tsdf" below 0.
        smooth: iterations of Taubin smoothing (1995), which rounds the steps of a binary grid and keeps the volume.

    Raises MeshError for another shape, values that are not finite, or a grid without any inside.
    """
    import trimesh
    from skimage.measure import marching_cubes

    inside = _positive_inside(np.asarray(voxels), field)
    # One layer of outside all around: whatever touches the border is closed there.
    padded = np.pad(inside, 1, constant_values=-1.0)
    # The variant of Lorensen and Cline (1987): that of Lewiner left open edges on 9 of 20 grids of random signs, this one none.
    vertices, faces, *_ = marching_cubes(padded, 0.0, method="lorensen", allow_degenerate=False)
    # The pad moved voxel 0 to index 1; skimage winds faces so that they look towards falling values: outward.
    vertices = (vertices - 1 + 0.5) / len(inside) - 0.5
    mesh = trimesh.Trimesh(vertices, faces[:, ::-1], process=False)
    if mesh.volume < 0:
        mesh.invert()
    if smooth:
        trimesh.smoothing.filter_taubin(mesh, lamb=0.5, nu=0.53, iterations=smooth)
    return mesh


def _positive_inside(voxels: np.ndarray, field: str) -> Float[np.ndarray, "r r r"]:
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
