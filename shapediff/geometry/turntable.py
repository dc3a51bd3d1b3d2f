"""Shapes that turn, as a GIF."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from shapediff.geometry.camera import COLOUR, Camera, Colour, Picture
from shapediff.geometry.raycast import Studio
from shapediff.geometry.sheets import contact_sheet, save_gif

if TYPE_CHECKING:
    import trimesh

SECONDS = 4.0
NUM_FRAMES = 36


def turntable(
    meshes: trimesh.Trimesh | Sequence[trimesh.Trimesh],
    path: str | Path,
    *,
    size: int = 256,
    num_frames: int = NUM_FRAMES,
    elevation: float = 22.0,
    colours: Colour | Sequence[Colour] = COLOUR,
    columns: int = 8,
) -> None:
    """Write a GIF of meshes that turn once about their upright axis, each (size, size), `columns` in a row.

    The light stands still. `colours`: one for all, or one for each. Raises ValueError without a mesh, MeshError for one without
    faces, both before anything is written.
    """
    shapes = list(meshes) if isinstance(meshes, Sequence) else [meshes]
    each = list(colours) if not isinstance(colours[0], float) else [colours] * len(shapes)
    turns = [
        _turn(mesh, size=size, num_frames=num_frames, elevation=elevation, colour=colour)  # type: ignore[arg-type]
        for mesh, colour in zip(shapes, each, strict=True)
    ]
    frames = [contact_sheet(pictures, columns=columns) for pictures in zip(*turns, strict=True)]
    save_gif(frames, path, seconds=SECONDS)


def _turn(mesh: trimesh.Trimesh, *, size: int, num_frames: int, elevation: float, colour: Colour) -> list[Picture]:
    studio = Studio(mesh)
    azimuths = 35 + np.arange(num_frames) * 360 / num_frames
    cameras = Camera.framing_turns(studio.vertices, azimuths.tolist(), elevation)
    return [studio.picture(camera, size=size, colour=colour) for camera in cameras]
