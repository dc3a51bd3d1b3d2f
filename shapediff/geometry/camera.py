"""Where a picture is taken from, and what it is painted on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

Picture = UInt8[np.ndarray, "h w 3"]
Colour = tuple[float, float, float]
"""Red, green and blue in [0, 1], encoded as sRGB."""

BACKGROUND = np.array([0.965, 0.968, 0.975])
COLOUR: Colour = (0.36, 0.56, 0.80)
PALETTE: tuple[Colour, ...] = (
    COLOUR,
    (0.91, 0.55, 0.38),
    (0.48, 0.68, 0.48),
    (0.89, 0.72, 0.36),
    (0.62, 0.52, 0.76),
    (0.36, 0.66, 0.68),
    (0.83, 0.47, 0.53),
    (0.60, 0.56, 0.50),
)
"""One colour a class, in turn: equally light, so that no class looks more important."""

MARGIN = 1.16
"""The picture is this much wider than the shape: room for its shadow."""
_DISTANCE = 5.0  # of the eye, in radii of the shape: a long lens, some 23 degrees


def axes(azimuth: float, elevation: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Right, up and towards-the-viewer, unit vectors (3,): from the front (+z), turned towards +x and raised, in degrees."""
    a, e = np.radians([azimuth, elevation])
    back = np.array([np.sin(a) * np.cos(e), np.sin(e), np.cos(a) * np.cos(e)])
    right = np.array([np.cos(a), 0.0, -np.sin(a)])
    return right, np.cross(back, right), back


@dataclass(frozen=True)
class Camera:
    """A pinhole at `eye`, `distance` from the middle of the shape. Its square frame spans `half` each way from `centre`, both in
    tangents of the viewing angle.
    """

    eye: Float[np.ndarray, " 3"]
    right: Float[np.ndarray, " 3"]
    up: Float[np.ndarray, " 3"]
    back: Float[np.ndarray, " 3"]
    centre: Float[np.ndarray, " 2"]
    half: float
    azimuth: float
    distance: float

    @classmethod
    def framing(cls, vertices: Float[np.ndarray, "v 3"], azimuth: float, elevation: float) -> Camera:
        """The camera that sees all vertices, as large as `MARGIN` lets them be."""
        return cls.framing_turns(vertices, [azimuth], elevation)[0]

    @classmethod
    def framing_turns(
        cls, vertices: Float[np.ndarray, "v 3"], azimuths: Sequence[float], elevation: float
    ) -> list[Camera]:
        """A camera for each azimuth, all with one frame, so that nothing jumps between them."""
        target = (vertices.min(0) + vertices.max(0)) / 2
        offsets = vertices - target
        distance = _DISTANCE * (float(np.sqrt((offsets**2).sum(1).max())) or 1.0)
        views = [axes(azimuth, elevation) for azimuth in azimuths]
        spans = np.array([_span(offsets, distance, *view) for view in views])
        low, high = spans[:, 0].min(0), spans[:, 1].max(0)
        centre, half = (low + high) / 2, float((high - low).max() / 2) * MARGIN or 1.0
        return [
            cls(target + distance * back, right, up, back, centre, half, azimuth, distance)
            for azimuth, (right, up, back) in zip(azimuths, views, strict=True)
        ]


def _span(
    offsets: Float[np.ndarray, "v 3"], distance: float, right: np.ndarray, up: np.ndarray, back: np.ndarray
) -> Float[np.ndarray, "2 2"]:
    """The lowest and highest tangents, to the right and upwards."""
    seen = (offsets @ np.stack([right, up], 1)) / (distance - offsets @ back)[:, None]
    return np.stack([seen.min(0), seen.max(0)])


def to_linear(colour: Sequence[float] | np.ndarray) -> Float[np.ndarray, " 3"]:
    """sRGB in [0, 1] to linear light."""
    encoded = np.asarray(colour, np.float64)
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def to_bytes(picture: Float[np.ndarray, "..."]) -> UInt8[np.ndarray, "..."]:
    """Values in [0, 1] to 0..255."""
    return (np.clip(picture, 0, 1) * 255 + 0.5).astype(np.uint8)
