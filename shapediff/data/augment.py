"""Symmetries of the cube on Morton-ordered signals, as index permutations: mirror images and turns about y.

Whether a sample is mirrored or turned follows from its own seed (`sampler.sample_seeds`), not from a shared generator.
"""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Bool, Int64, Integer

from shapediff.data.manifest import Field
from shapediff.data.packing import Rows
from shapediff.grid.morton import flip_permutation, permute, resolution_of, rotate90_permutation

Array = TypeVar("Array", np.ndarray, torch.Tensor)

_X, _Y = 0, 1
_MIRROR_BIT, _TURN_BITS = 40, 41

# (256,) uint8: each octet with its x neighbours (bits 0 and 1, 2 and 3, ...) exchanged.
_SWAPPED_X = np.array([(byte & 0x55) << 1 | (byte & 0xAA) >> 1 for byte in range(256)], dtype=np.uint8)


# (4, 256) uint8: each octet turned by k quarter turns about y.
_BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little")
_TURNED_Y = np.stack(
    [np.packbits(permute(_BITS, rotate90_permutation(2, _Y, k)), axis=1, bitorder="little")[:, 0] for k in range(4)]
)


def mirror_x(flat: Array) -> Array:
    """`(..., R^3)` signals with left and right exchanged (x -> -x)."""
    return permute(flat, flip_permutation(resolution_of(flat.shape[-1]), _X))


def mirror_rows(rows: Rows, *, field: Field) -> Rows:
    """The packed rows (n, bytes) of the mirrored shapes: `mirror_x` before unpacking, on fewer bytes."""
    if field == "tsdf":
        return mirror_x(rows)
    return _SWAPPED_X[mirror_x(rows)]


def turn_y(flat: Array, k: int) -> Array:
    """`(..., R^3)` signals turned by k right-handed quarter turns about y: one moves +z to +x."""
    return permute(flat, rotate90_permutation(resolution_of(flat.shape[-1]), _Y, k % 4))


def turn_rows(rows: Rows, k: int, *, field: Field) -> Rows:
    """The packed rows (n, bytes) of the turned shapes: `turn_y` before unpacking, on fewer bytes."""
    if field == "tsdf":
        return turn_y(rows, k)
    return _TURNED_Y[k % 4][turn_y(rows, k)]


def versions_of(
    num: int, *, mirror_seeds: Int64[np.ndarray, " b"] | None, turn_seeds: Int64[np.ndarray, " b"] | None
) -> Int64[np.ndarray, " b"]:
    """Which of the 8 images of `num` shapes these seeds ask for: 1 where mirrored, and 2 for each quarter turn after that."""
    versions = np.zeros(num, dtype=np.int64)
    if mirror_seeds is not None:
        versions += mirror_coins(mirror_seeds)
    if turn_seeds is not None:
        versions += 2 * turn_choices(turn_seeds)
    return versions


def seeds_of_versions(versions: Int64[np.ndarray, " b"]) -> Int64[np.ndarray, " b"]:
    """Seeds that ask for these images: the inverse of `versions_of`."""
    return (versions & 1) << _MIRROR_BIT | versions >> 1 << _TURN_BITS


def turn_choices(seeds: Integer[np.ndarray, " b"]) -> Integer[np.ndarray, " b"]:
    """For each sample's seed its number of quarter turns, 0 to 3 with equal chances: two bits of the seed."""
    return (np.asarray(seeds) >> _TURN_BITS) & 3


def mirror_coins(seeds: Integer[np.ndarray, " b"]) -> Bool[np.ndarray, " b"]:
    """For each sample's seed, whether the sample is mirrored: one bit of the seed, so half of them are."""
    return ((np.asarray(seeds) >> _MIRROR_BIT) & 1).astype(bool)
