"""Grids -> shaded pictures from fixed views, the same way for every set that is compared: what eyes see of a shape."""

from __future__ import annotations

import numpy as np
from jaxtyping import UInt8

from shapediff.evaluation.points import Grids
from shapediff.geometry.raymarch import render_voxels

Pictures = UInt8[np.ndarray, "n v s s"]

PICTURE_SIZE = 48
VIEWS = tuple((azimuth, elevation) for elevation in (35.26, -35.26) for azimuth in (45.0, 135.0, 225.0, 315.0))
"""Degrees (azimuth, elevation): from the eight corners of the cube, each of which sees three of its faces alike."""
_GREY = (0.5, 0.5, 0.5)
"""Dark on the light background, so that outlines count as well as shades."""


def shaded_pictures(grids: Grids) -> Pictures:
    """The brightness (n, 8, 48, 48) of each grid's surface from VIEWS: orthographic, the whole cube, one light, no shadow.

    Nothing is turned, scaled or framed: place, size and direction are part of what a model must get right. Only the surface
    counts, and of it what is seen from outside. An empty grid is background alone.
    """
    pictures = np.empty((len(grids), len(VIEWS), PICTURE_SIZE, PICTURE_SIZE), np.uint8)
    for i, grid in enumerate(grids):
        signal = np.where(grid, np.float32(1), np.float32(-1))
        for j, (azimuth, elevation) in enumerate(VIEWS):
            seen = render_voxels(signal, size=PICTURE_SIZE, azimuth=azimuth, elevation=elevation, colour=_GREY)
            pictures[i, j] = seen.mean(-1).round()  # the background is bluish
    return pictures
