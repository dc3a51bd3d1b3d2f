"""Grid -> mesh that prints: cleaned, closed, of a real size, in few faces. One dataclass says how."""

from __future__ import annotations

import logging
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

import numpy as np
from jaxtyping import Bool, Float

from shapediff.errors import ConfigError
from shapediff.geometry.blocks import block_surface
from shapediff.geometry.export import fill_cavities, remove_floaters
from shapediff.geometry.isosurface import positive_inside, voxels_to_mesh
from shapediff.geometry.report import check_surface
from shapediff.geometry.simplify import merge_flat, simplify_surface

if TYPE_CHECKING:
    import trimesh

Surface = Literal["smooth", "blocks"]
Up = Literal["y", "z"]

MIN_FACES = 20
MIN_HEIGHT, MAX_HEIGHT = 1e-3, 1e3
"""Metres: below this files with 8 decimals lose faces."""

_METRES = {"": 1.0, "m": 1.0, "cm": 0.01, "mm": 0.001, "in": 0.0254, "ft": 0.3048}

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class MeshOptions:
    """How a grid becomes a mesh.

    surface: "smooth" (marching cubes, smoothed) or "blocks" (the exposed faces of voxels).
    smoothing: iterations of smoothing of a smooth surface; 0 for none.
    max_faces: at most this many, as far as the shape can have so few; None for as many as there are.
    height: along y, in metres; the mesh then stands on 0, in the middle of the other axes. None: the mesh is in the unit cube
        around 0, a voxel being 1 / R.
    up: the axis that points up in the mesh.
    keep_cavities: keep hollows that nothing leads to; they are filled otherwise.
    min_part: parts smaller than this share of the largest, by volume, are removed.

    Raises ConfigError for values out of range.
    """

    surface: Surface = "smooth"
    smoothing: int = 12
    max_faces: int | None = None
    height: float | None = None
    up: Up = "y"
    keep_cavities: bool = False
    min_part: float = 0.05

    def __post_init__(self) -> None:
        for name, value, known in (("surface", self.surface, get_args(Surface)), ("up", self.up, get_args(Up))):
            if value not in known:
                raise ConfigError(f"{name}={value!r} is unknown; use one of {', '.join(known)}")
        if not 0 <= self.smoothing <= 100:
            raise ConfigError(f"smoothing={self.smoothing} must be from 0 to 100")
        if self.max_faces is not None and self.max_faces < MIN_FACES:
            raise ConfigError(f"max_faces={self.max_faces} must be at least {MIN_FACES}")
        if self.height is not None and not MIN_HEIGHT <= self.height <= MAX_HEIGHT:
            raise ConfigError(f"height={self.height} m must be from {MIN_HEIGHT:g} to {MAX_HEIGHT:g} metres")
        if not 0 <= self.min_part <= 1:
            raise ConfigError(f"min_part={self.min_part} must be from 0 to 1, a share of the largest part")


def parse_length(text: str) -> float:
    """Metres in "0.9m", "90cm", "900 mm", "35in", "3ft", or "0.9" without a unit. Raises ConfigError for anything else."""
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([a-z]*)\s*", text.lower())
    if found is None or found[2] not in _METRES:
        raise ConfigError(f"{text!r} is no length; use a number and m, cm, mm, in or ft, such as 0.9m")
    return float(found[1]) * _METRES[found[2]]


def length_text(metres: float) -> str:
    """A length as people say it, to three digits: 12 cm, 1.2 m, 4.5 mm."""
    for unit, factor in (("m", 1.0), ("cm", 0.01)):
        if float(f"{metres:.3g}") >= factor:
            return f"{metres / factor:.3g} {unit}"
    return f"{metres / 0.001:.3g} mm"


def clean_signal(signal: Float[np.ndarray, "r r r"], options: MeshOptions) -> Float[np.ndarray, "r r r"]:
    """The signal without small parts, and without cavities unless they are kept."""
    cleaned = remove_floaters(signal, min_fraction=options.min_part)
    return cleaned if options.keep_cavities else fill_cavities(cleaned)


def solid_voxels(signal: Float[np.ndarray, "r r r"], options: MeshOptions) -> Bool[np.ndarray, "r r r"]:
    """Which voxels are inside once the signal is clean; raises as `printable_mesh`."""
    return positive_inside(clean_signal(signal, options)) > 0


def printable_mesh(signal: Float[np.ndarray, "r r r"], options: MeshOptions | None = None) -> trimesh.Trimesh:
    """The mesh of a signal (positive inside), in metres: closed, manifold, oriented outward, without faces of no height.

    Raises MeshError where the signal has no inside or values that are not finite.
    """
    import trimesh

    options = options or MeshOptions()
    vertices, faces = _surface(clean_signal(signal, options), options)
    if options.max_faces is not None and len(faces) > options.max_faces:
        surface = vertices, faces
        vertices, faces = _if_printable(simplify_surface(*surface, max_faces=options.max_faces), surface)
        if len(faces) > options.max_faces:
            _log.warning(
                "max_faces=%d is not met: the mesh has %d, with fewer it would not stay closed and apart from itself",
                options.max_faces,
                len(faces),
            )
    return trimesh.Trimesh(_placed(vertices / len(signal) - 0.5, options), faces, process=False)


def _surface(signal: Float[np.ndarray, "r r r"], options: MeshOptions) -> tuple[np.ndarray, np.ndarray]:
    """(vertices in voxels, faces)."""
    if options.surface == "blocks":
        blocks = block_surface(positive_inside(signal) > 0)
        return _if_printable(merge_flat(*blocks), blocks)
    mesh = voxels_to_mesh(signal, smooth=options.smoothing)
    return (np.asarray(mesh.vertices) + 0.5) * len(signal), np.asarray(mesh.faces)


def _if_printable(
    fewer: tuple[np.ndarray, np.ndarray], before: tuple[np.ndarray, np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
    """The surface with fewer faces, unless a library opened or crossed it: then the one before."""
    return fewer if check_surface(*fewer).is_printable else before


def _placed(vertices: Float[np.ndarray, "v 3"], options: MeshOptions) -> Float[np.ndarray, "v 3"]:
    """Unit-cube coordinates, y up, to those asked for."""
    if options.height is not None:
        low, high = vertices.min(0), vertices.max(0)
        middle = (low + high) / 2
        vertices = (vertices - [middle[0], low[1], middle[2]]) * (options.height / (high[1] - low[1]))
    # The front, +z, comes to face -y: the way back of load_mesh(up="z").
    return vertices[:, [0, 2, 1]] * [1, -1, 1] if options.up == "z" else vertices
