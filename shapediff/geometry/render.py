"""Pictures without a display or a GPU: meshes by ray casting, grids by ray marching, contact sheets.

Cameras are orthographic and look at the shape from the front (+z), turned by `azimuth` towards +x and raised by `elevation`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Bool, Float, UInt8

from shapediff.files import replaced_file

if TYPE_CHECKING:
    import trimesh

Picture = UInt8[np.ndarray, "h w 3"]

BACKGROUND = np.array([0.965, 0.968, 0.975])
COLOUR = (0.42, 0.60, 0.80)
KEY_LIGHT = np.array([0.35, 0.80, 0.50]) / np.linalg.norm([0.35, 0.80, 0.50])
AMBIENT, SHADOW = 0.45, 0.55
SMOOTH_ABOVE = np.cos(np.radians(40))


@dataclass(frozen=True)
class _Camera:
    """Right, up and towards-the-viewer, unit vectors, (3,) each."""

    right: Float[np.ndarray, " 3"]
    up: Float[np.ndarray, " 3"]
    back: Float[np.ndarray, " 3"]

    @classmethod
    def looking(cls, azimuth: float, elevation: float) -> _Camera:
        a, e = np.radians([azimuth, elevation])
        back = np.array([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)])
        right = np.array([np.cos(a), 0.0, -np.sin(a)])
        return cls(right, np.cross(back, right), back)

    def plane(self, size: int, half_width: float) -> Float[np.ndarray, "h w 3"]:
        """The points of the image plane through the origin, row 0 at the top."""
        steps = (np.arange(size) + 0.5) / size * 2 - 1
        return half_width * (steps[None, :, None] * self.right - steps[:, None, None] * self.up)


def render_mesh(
    mesh: trimesh.Trimesh,
    *,
    size: int = 256,
    azimuth: float = 35.0,
    elevation: float = 22.0,
    colour: tuple[float, float, float] = COLOUR,
) -> Picture:
    """A picture (size, size, 3) of a mesh, y up, framed as a whole, with a soft ambient, one light and its shadow."""
    import open3d as o3d

    camera = _Camera.looking(azimuth, elevation)
    centre = mesh.bounds.mean(0)
    reach = float(np.linalg.norm(mesh.vertices - centre, axis=1).max()) or 1.0
    scene = o3d.t.geometry.RaycastingScene(nthreads=1)
    scene.add_triangles(
        o3d.core.Tensor.from_numpy(np.asarray(mesh.vertices - centre, np.float32)),
        o3d.core.Tensor.from_numpy(np.asarray(mesh.faces, np.uint32)),
    )
    fine = 2 * size  # four rays a pixel
    origins = (camera.plane(fine, 1.04 * reach) + 2 * reach * camera.back).reshape(-1, 3)
    hit = scene.cast_rays(_rays(o3d, origins, -camera.back))
    distance = hit["t_hit"].numpy()
    seen = np.isfinite(distance)
    points = origins[seen] - distance[seen, None] * camera.back
    normals = _shading_normals(mesh, hit["primitive_ids"].numpy()[seen], hit["primitive_uvs"].numpy()[seen], camera)
    lit = ~scene.test_occlusions(_rays(o3d, points + 1e-3 * reach * (normals + KEY_LIGHT), KEY_LIGHT)).numpy()
    picture = np.tile(BACKGROUND.astype(np.float32), (fine * fine, 1))
    picture[seen] = _shade(normals, lit, colour)
    return _to_bytes((picture.reshape(size, 2, size, 2, 3).sum(1).sum(2)) / 4)


def render_voxels(
    signal: Float[np.ndarray, "r r r"],
    *,
    size: int = 160,
    azimuth: float = 35.0,
    elevation: float = 22.0,
    colour: tuple[float, float, float] = COLOUR,
) -> Picture:
    """A picture (size, size, 3) of the surface where a signal (R, R, R) crosses 0, by marching rays through the grid.

    Needs NumPy and SciPy alone, so that a training node can draw.
    """
    from scipy.ndimage import gaussian_filter, map_coordinates

    camera, resolution = _Camera.looking(azimuth, elevation), len(signal)
    plane = camera.plane(size, 0.80).reshape(-1, 3)
    picture = np.tile(BACKGROUND, (size * size, 1))
    field = np.pad(np.asarray(signal, np.float32), 1, constant_values=-1.0)

    def at(values: np.ndarray, points: np.ndarray) -> np.ndarray:
        places = (points + 0.5) * resolution - 0.5 + 1
        flat = map_coordinates(values, places.reshape(-1, 3).T, order=1, mode="nearest")
        return flat.reshape(points.shape[:-1])

    rays, near, far = _through_box(plane, camera.back, *_bounds(field > 0, resolution))
    if len(rays):
        num_steps = int(np.ceil(1.5 * resolution * (near - far).max())) + 2
        depths = near[:, None] + (far - near)[:, None] * np.linspace(0, 1, num_steps)
        inside = at(field, plane[rays, None] + depths[..., None] * camera.back) > 0
        is_hit = inside.any(1)
        first = depths[is_hit, inside[is_hit].argmax(1)]
        points = plane[rays[is_hit]] + first[:, None] * camera.back
        smooth, step = gaussian_filter(field, 0.8), np.eye(3) / resolution
        normals = np.stack([at(smooth, points - axis) - at(smooth, points + axis) for axis in step], -1)
        normals /= np.linalg.norm(normals, axis=-1, keepdims=True) + 1e-9
        picture[rays[is_hit]] = _shade(normals, np.ones(len(normals), bool), colour)
    return _to_bytes(picture.reshape(size, size, 3))


def contact_sheet(pictures: Sequence[Picture], *, columns: int, captions: Sequence[str] | None = None) -> Picture:
    """Pictures of one size in rows of `columns`, each with its caption below. Raises ValueError where there is none."""
    from PIL import Image, ImageDraw

    if not pictures:
        raise ValueError("a contact sheet needs at least one picture")
    height, width = pictures[0].shape[:2]
    strip = 18 if captions else 0
    columns = min(columns, len(pictures))
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * width, rows * (height + strip)), tuple(_to_bytes(BACKGROUND).tolist()))
    draw = ImageDraw.Draw(sheet)
    for i, picture in enumerate(pictures):
        x, y = i % columns * width, i // columns * (height + strip)
        sheet.paste(Image.fromarray(picture), (x, y))
        if captions:
            draw.text(
                (x + width / 2, y + height + strip / 2), captions[i][: width // 6], fill=(70, 74, 84), anchor="mm"
            )
    return np.asarray(sheet)


def save_png(picture: Picture, path: str | Path) -> None:
    """Write a PNG beside its place, then at once."""
    from PIL import Image

    with replaced_file(path) as partial:
        Image.fromarray(picture).save(partial, format="PNG")


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


def _rays(o3d: Any, origins: Float[np.ndarray, "n 3"], direction: Float[np.ndarray, " 3"]) -> Any:
    rays = np.empty((len(origins), 6), np.float32)
    rays[:, :3], rays[:, 3:] = origins, direction
    return o3d.core.Tensor.from_numpy(rays)


def _shading_normals(
    mesh: trimesh.Trimesh, faces: np.ndarray, uv: Float[np.ndarray, "n 2"], camera: _Camera
) -> Float[np.ndarray, "n 3"]:
    """Interpolated vertex normals, but the face's own at creases; turned towards the viewer, since faces may be inside out."""
    corners, flat = mesh.vertex_normals.astype(np.float32)[mesh.faces], mesh.face_normals.astype(np.float32)
    is_crease = (np.einsum("ncd,nd->nc", corners, flat) < SMOOTH_ABOVE).any(1)
    corners[is_crease] = flat[is_crease, None]
    u, v = uv[:, :1], uv[:, 1:]
    normals = (1 - u - v) * corners[:, 0][faces] + u * corners[:, 1][faces] + v * corners[:, 2][faces]
    normals /= np.linalg.norm(normals, axis=1, keepdims=True) + 1e-9
    return np.where((normals @ camera.back < 0)[:, None], -normals, normals)


def _shade(
    normals: Float[np.ndarray, "n 3"], lit: Bool[np.ndarray, " n"], colour: tuple[float, float, float]
) -> Float[np.ndarray, "n 3"]:
    sky = AMBIENT * (0.65 + 0.35 * normals[:, 1])
    sun = SHADOW * np.clip(normals @ KEY_LIGHT, 0, 1) * lit
    return np.clip((sky + sun)[:, None] * 1.15 * np.array(colour), 0, 1)


def _to_bytes(picture: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
