"""Pictures of grids by marching rays through them, with NumPy and SciPy alone: a training node can draw.

The camera is orthographic and sees the whole cube, so that sizes compare. There is no shadow.
"""

from __future__ import annotations

import numpy as np
from jaxtyping import Bool, Float

from shapediff.geometry.camera import BACKGROUND, COLOUR, Colour, Picture, axes, to_bytes

_LIGHT = np.array([0.35, 0.80, 0.50]) / np.linalg.norm([0.35, 0.80, 0.50])
_AMBIENT, _DIRECT = 0.45, 0.55


def render_voxels(
    signal: Float[np.ndarray, "r r r"],
    *,
    size: int = 160,
    azimuth: float = 35.0,
    elevation: float = 22.0,
    colour: Colour = COLOUR,
) -> Picture:
    """A picture (size, size, 3) of the surface where a signal (R, R, R) crosses 0, by marching rays through the grid."""
    from scipy.ndimage import gaussian_filter, map_coordinates

    (right, up, back), resolution = axes(azimuth, elevation), len(signal)
    steps = 0.80 * ((np.arange(size) + 0.5) / size * 2 - 1)
    plane = (steps[None, :, None] * right - steps[:, None, None] * up).reshape(-1, 3)
    picture = np.tile(BACKGROUND, (size * size, 1))
    field = np.pad(np.asarray(signal, np.float32), 1, constant_values=-1.0)

    def at(values: np.ndarray, points: np.ndarray) -> np.ndarray:
        places = (points + 0.5) * resolution - 0.5 + 1
        flat = map_coordinates(values, places.reshape(-1, 3).T, order=1, mode="nearest")
        return flat.reshape(points.shape[:-1])

    rays, near, far = _through_box(plane, back, *_bounds(field > 0, resolution))
    if len(rays):
        num_steps = int(np.ceil(1.5 * resolution * (near - far).max())) + 2
        depths = near[:, None] + (far - near)[:, None] * np.linspace(0, 1, num_steps)
        inside = at(field, plane[rays, None] + depths[..., None] * back) > 0
        is_hit = inside.any(1)
        first = depths[is_hit, inside[is_hit].argmax(1)]
        points = plane[rays[is_hit]] + first[:, None] * back
        smooth, step = gaussian_filter(field, 0.8), np.eye(3) / resolution
        normals = np.stack([at(smooth, points - axis) - at(smooth, points + axis) for axis in step], -1)
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True) + 1e-9
        picture[rays[is_hit]] = _shade(normals, colour)
    return to_bytes(picture.reshape(size, size, 3))


def _bounds(inside: Bool[np.ndarray, "p p p"], resolution: int) -> tuple[np.ndarray, np.ndarray]:
    """Opposite corners (3,) of a box around what a padded grid has inside, and a voxel of air; empty if that is nothing."""
    low, high = np.ones(3), np.zeros(3)
    if inside.any():
        for axis in range(3):
            filled = np.flatnonzero(inside.any(tuple(a for a in range(3) if a != axis)))
            low[axis], high[axis] = filled[0] - 1.5, filled[-1] + 0.5
    return low / resolution - 0.5, high / resolution - 0.5


def _through_box(
    origins: Float[np.ndarray, "n 3"], back: Float[np.ndarray, " 3"], low: np.ndarray, high: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(which rays origin + depth * back pass a box, depth at which they enter, depth at which they leave: the smaller one)."""
    along = np.where(np.abs(back) < 1e-12, 1e-12, back)
    one, other = (low - origins) / along, (high - origins) / along
    near, far = np.maximum(one, other).min(1), np.minimum(one, other).max(1)
    rays = np.flatnonzero((near > far) & (low < high).all())
    return rays, near[rays], far[rays]


def _shade(normals: Float[np.ndarray, "n 3"], colour: Colour) -> Float[np.ndarray, "n 3"]:
    sky = _AMBIENT * (0.65 + 0.35 * normals[:, 1])
    sun = _DIRECT * np.clip(normals @ _LIGHT, 0, 1)
    return np.clip((sky + sun)[:, None] * 1.15 * np.array(colour), 0, 1)
