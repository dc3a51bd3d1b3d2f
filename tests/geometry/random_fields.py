"""Signals that are hard to make a closed mesh of, by kind."""

from __future__ import annotations

import numpy as np
from scipy.ndimage import gaussian_filter

KINDS = ("noise", "shell", "checkerboard", "touching", "signs", "near zero")


def random_field(kind: str, seed: int, *, resolution: int = 10) -> np.ndarray:
    """A float32 signal (R, R, R), positive inside, never empty."""
    rng = np.random.default_rng([KINDS.index(kind), seed])
    field = _BUILD[kind](rng, resolution).astype(np.float32)
    if not (field > 0).any():
        field[resolution // 2, 0, resolution // 2] = 1
    return field


def _noise(rng: np.random.Generator, r: int) -> np.ndarray:
    field = gaussian_filter(rng.normal(size=(r, r, r)), rng.uniform(0.6, 2))
    return field / np.abs(field).max()


def _shell(rng: np.random.Generator, r: int) -> np.ndarray:
    """A voxel thick, with holes, cut off by the border at times."""
    radius = np.linalg.norm(np.indices((r, r, r)) - (r - 1) / 2 + rng.uniform(-1, 1, (3, 1, 1, 1)), axis=0)
    shell = np.abs(radius - rng.uniform(0.2, 0.6) * r) < rng.uniform(0.4, 0.8)
    return np.where(shell & (rng.random((r, r, r)) < 0.97), 1.0, -1.0)


def _checkerboard(rng: np.random.Generator, r: int) -> np.ndarray:
    field = np.where((np.indices((r, r, r)) // rng.integers(1, 3)).sum(0) % 2 == 0, 1.0, -1.0)
    field[rng.random(field.shape) < rng.uniform(0, 0.3)] *= -1
    return field


def _touching(rng: np.random.Generator, r: int) -> np.ndarray:
    """Pairs of voxels that touch by a face, an edge or a corner."""
    field = np.full((r, r, r), -1.0)
    for _ in range(6):
        at = rng.integers(1, r - 1, 3)
        field[tuple(at)] = field[tuple(at + rng.integers(-1, 2, 3))] = 1
    return field


def _signs(rng: np.random.Generator, r: int) -> np.ndarray:
    return np.where(rng.random((r, r, r)) < rng.uniform(0.05, 0.95), 1.0, -1.0)


def _near_zero(rng: np.random.Generator, r: int) -> np.ndarray:
    return rng.choice([0, 1e-9, -1e-9, 1, -1, 0.5, -1e-3], size=(r, r, r))


_BUILD = dict(zip(KINDS, (_noise, _shell, _checkerboard, _touching, _signs, _near_zero), strict=True))
