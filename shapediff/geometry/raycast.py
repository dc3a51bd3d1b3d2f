"""Pictures of meshes by ray casting: a soft key light, an open sky, the ground and the shadow on it. No display, no GPU.

Each pixel sends one ray, those at edges four more. Every second pixel of every second row asks the lights, along directions that
sixteen neighbours share out among them, and a filter that stops at edges spreads the answers: 80 light rays for the cost of 5.
There is no random number in it: a mesh always looks the same.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, UInt8

from shapediff.errors import MeshError
from shapediff.geometry.camera import BACKGROUND, COLOUR, Camera, Colour, Picture, axes, to_bytes, to_linear

if TYPE_CHECKING:
    import trimesh

CREASE_DEGREES = 35.0
MAX_SIZE = 8192

KEY_AZIMUTH, KEY_ELEVATION, KEY_RADIUS = -42.0, 50.0, 9.0
"""Degrees: the key light stands to the left of the camera, and is a disc of this radius."""
KEY = np.array([1.00, 0.95, 0.88], np.float32) * 1.15
SKY = np.array([0.86, 0.93, 1.00], np.float32) * 0.95
GROUND = np.array([1.00, 0.97, 0.93], np.float32) * 0.42
_NUM_KEY, _NUM_SKY = 2, 3  # light rays of a pixel
_EDGE = 12  # of 255: a step between neighbours that eyes see
_SUBPIXELS = (np.array([[1, 3, 7, 9], [3, 9, 1, 7]]) / 10 - 0.5).astype(np.float32)
_ENCODED = to_bytes(np.interp(np.linspace(0, 1, 1 << 16), to_linear(np.linspace(0, 1, 1024)), np.linspace(0, 1, 1024)))
# Which sixteenth of the directions each of 4 x 4 pixels takes: neighbours' are far apart, so that any few are well spread.
_ROW_OF_CELL = np.array([0, 8, 2, 10, 12, 4, 14, 6, 3, 11, 1, 9, 15, 7, 13, 5])


def render_mesh(
    mesh: trimesh.Trimesh,
    *,
    size: int = 256,
    azimuth: float = 35.0,
    elevation: float = 22.0,
    colour: Colour = COLOUR,
) -> Picture:
    """A picture (size, size, 3) of a mesh, y up, framed as a whole; seen from above, it stands on the ground.

    The camera stands in front (+z), turned by `azimuth` towards +x and raised by `elevation`, in degrees; the light moves with
    it. `size`: pixels, 8 to 8192. Raises MeshError for a mesh without faces or with coordinates that are not finite.
    """
    studio = Studio(mesh)
    return studio.picture(Camera.framing(studio.vertices, azimuth, elevation), size=size, colour=colour)


class Studio:
    """A mesh set up for any number of pictures."""

    def __init__(self, mesh: trimesh.Trimesh) -> None:
        import open3d as o3d

        from shapediff.geometry.kernels.shading import corner_normals

        self.vertices = np.ascontiguousarray(mesh.vertices, np.float32)
        self._faces = np.ascontiguousarray(mesh.faces, np.uint32)
        if not len(self._faces) or not np.isfinite(self.vertices[self._faces.ravel()]).all():
            raise MeshError("a picture needs a mesh with faces and finite coordinates")
        self._normals = corner_normals(self.vertices, self._faces, np.cos(np.radians(CREASE_DEGREES)))
        self._low, self._high = self.vertices.min(0), self.vertices.max(0)
        self._middle = (self._low + self._high) / 2
        self._reach = np.float32(np.linalg.norm(self._high - self._low) / 2 or 1.0)
        self._scene = o3d.t.geometry.RaycastingScene(nthreads=1)
        self._scene.add_triangles(_tensor(self.vertices), _tensor(self._faces))

    def picture(self, camera: Camera, *, size: int, colour: Colour = COLOUR) -> Picture:
        """What the camera sees, (size, size, 3). Raises ValueError for a size outside 8 to 8192."""
        from shapediff.geometry.kernels import shading

        if not 8 <= size <= MAX_SIZE:
            raise ValueError(f"size={size} must be from 8 to {MAX_SIZE} pixels")
        even = size + size % 2  # the light is asked for at every second pixel
        rows, columns = np.divmod(np.arange(even * even), even)
        grid = self._cast(camera, size, (columns + 0.5).astype(np.float32), (rows + 0.5).astype(np.float32))
        near = np.float32(4 * camera.half * camera.distance / size)  # two pixels' width where the shape is
        probes = grid.every_second(even)
        to_key, light = self._light(probes, camera, near)

        def shaded(points: _Points) -> Float[np.ndarray, "n 3"]:
            seen = shading.light_at(
                points.columns, points.rows, points.place, points.normal, points.kind,
                light, probes.place, probes.normal, probes.kind, even // 2, near,
            )  # fmt: skip
            return shading.shade(
                seen, points.normal, points.kind, points.share, points.rays, to_key, KEY, SKY, GROUND,
                to_linear(colour), to_linear(BACKGROUND),
            )  # fmt: skip

        colours = shaded(grid)
        picture = _encoded(colours)
        edge = shading.edges(picture, even, _EDGE)
        finer_columns, finer_rows = (
            (of[edge, None] + spots).ravel() for of, spots in zip((grid.columns, grid.rows), _SUBPIXELS, strict=True)
        )
        finer = shaded(self._cast(camera, size, finer_columns, finer_rows))
        picture[edge] = _encoded(
            (colours[edge] + finer.reshape(len(edge), _SUBPIXELS.shape[1], 3).sum(1)) / (1 + _SUBPIXELS.shape[1])
        )
        return picture.reshape(even, even, 3)[:size, :size]

    def _cast(self, camera: Camera, size: int, columns: np.ndarray, rows: np.ndarray) -> _Points:
        """What is at places of the picture, given in pixels."""
        from shapediff.geometry.kernels import shading

        seen_from = (camera.eye, camera.right, camera.up, camera.back, camera.centre, camera.half, size)
        rays = shading.camera_rays(*seen_from, columns, rows)
        tiles = shading.covered_tiles(*seen_from, self.vertices, self._faces)
        aimed = shading.within_tiles(tiles, columns, rows)
        hit = self._scene.cast_rays(_tensor(rays[aimed]))
        met = shading.resolve(
            rays, aimed, hit["t_hit"].numpy(), hit["primitive_ids"].numpy(), hit["primitive_uvs"].numpy(),
            self.vertices, self._faces, self._normals, self._middle, self._low[1], self._reach, size, columns, rows,
        )  # fmt: skip
        return _Points(columns, rows, rays, *met)

    def _light(self, probes: _Points, camera: Camera, near: np.float32) -> tuple[np.ndarray, np.ndarray]:
        """(direction to the key light, what the probes see of the lights)."""
        from shapediff.geometry.kernels import shading

        to_world = np.stack(axes(camera.azimuth + KEY_AZIMUTH, KEY_ELEVATION)).astype(np.float32)
        key, sky = _key_directions() @ to_world, _sky_directions()
        side, lift = round(len(probes.kind) ** 0.5), np.float32(1e-3 * self._reach)
        rays, numbers = shading.light_rays(
            probes.start, probes.normal, probes.kind, side, self._low, self._high, lift, key, sky
        )
        blocked = np.zeros(side * side * (_NUM_KEY + _NUM_SKY), np.bool_)
        blocked[numbers] = self._scene.test_occlusions(_tensor(rays)).numpy()
        light = shading.gather_light(probes.normal, probes.kind, side, blocked, key, sky)
        return to_world[2], shading.smooth_light(light, probes.place, probes.normal, probes.kind, side, near)


@dataclass(frozen=True)
class _Points:
    """What rays of the camera met; see `shapediff.geometry.kernels.shading`."""

    columns: Float[np.ndarray, " n"]
    rows: Float[np.ndarray, " n"]
    rays: Float[np.ndarray, "n 6"]
    place: Float[np.ndarray, "n 3"]
    normal: Float[np.ndarray, "n 3"]
    start: Float[np.ndarray, "n 3"]
    kind: UInt8[np.ndarray, " n"]
    share: Float[np.ndarray, " n"]

    def every_second(self, size: int) -> _Points:
        """Those of every second row and column of a square of points."""
        arrays = (getattr(self, field.name) for field in fields(self))
        return _Points(*(of.reshape(size, size, -1)[::2, ::2].reshape(-1, *of.shape[1:]) for of in arrays))


def _encoded(colours: Float[np.ndarray, "n 3"]) -> UInt8[np.ndarray, "n 3"]:
    return _ENCODED[(colours * np.float32(len(_ENCODED) - 1)).astype(np.uint16)]


@cache
def _key_directions() -> Float[np.ndarray, "16 k 3"]:
    """Directions to a disc in the direction of z."""
    radius, angle = np.tan(np.radians(KEY_RADIUS)), 2 * np.pi
    u, v = _spread(_NUM_KEY)
    directions = np.stack(
        [radius * np.sqrt(u) * np.cos(angle * v), radius * np.sqrt(u) * np.sin(angle * v), 0 * u + 1], -1
    )
    return (directions / np.linalg.norm(directions, axis=-1, keepdims=True)).astype(np.float32)


@cache
def _sky_directions() -> Float[np.ndarray, "16 k 3"]:
    """Directions around z, as dense as their cosine with it."""
    u, v = _spread(_NUM_SKY)
    return np.stack(
        [np.sqrt(u) * np.cos(2 * np.pi * v), np.sqrt(u) * np.sin(2 * np.pi * v), np.sqrt(1 - u)], -1
    ).astype(np.float32)


def _spread(num: int) -> Float[np.ndarray, "2 16 k"]:
    """Points of the unit square, evenly spread both in each of 16 rows and all together: the R2 sequence (Roberts 2018)."""
    steps = np.arange(16 * num).reshape(16, num)
    steps = steps[_ROW_OF_CELL]
    return np.stack([(0.5 + steps * ratio) % 1 for ratio in (0.7548776662466927, 0.5698402909980532)])


def _tensor(values: np.ndarray) -> Any:
    import open3d as o3d

    return o3d.core.Tensor.from_numpy(np.ascontiguousarray(values))
