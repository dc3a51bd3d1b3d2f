"""Occupancy grids as octrees, coarse to fine: one token of eight child bits a node, read off the Morton-ordered grid.

A node of depth d is a cube of side R / 2^d; its children are 8 consecutive nodes of depth d + 1, so that every level is a reshape
of the grid. Tokens come depth by depth, within a depth in Morton order. A token has bit i set where child i is not empty. Empty
nodes have no token and full ones are not refined: a node that is not the root cannot have all bits clear, so 0 says "full" there.
In the last depth the children are voxels, and a full node is 255.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Int64, UInt8

from shapediff.errors import DataError

FULL = 0
"""The token of a full node between the root and the last depth."""

_BITS = (1 << np.arange(8)).astype(np.uint8)


@dataclass(frozen=True)
class Octree:
    """The nodes that are not empty, depth by depth: `tokens`, `depths` and `codes`, one entry a node.

    `codes` are Morton codes on the grid of 2^depth nodes a side. An empty grid has the root alone, with token 0.
    """

    tokens: UInt8[np.ndarray, " nodes"]
    depths: Int64[np.ndarray, " nodes"]
    codes: Int64[np.ndarray, " nodes"]


def encode_octree(occupancy: Bool[np.ndarray, " voxels"]) -> Octree:
    """The octree of a grid of 8^k voxels in Morton order, k >= 1. Raises ValueError for another number of voxels."""
    num_depths = _num_depths(len(occupancy))
    # Of each depth, from the root to the voxels: whether any of a node, and all of it, is inside.
    nodes = [occupancy.reshape(8**depth, -1) for depth in range(num_depths + 1)]
    is_some, is_all = [np.asarray(n.any(1)) for n in nodes], [np.asarray(n.all(1)) for n in nodes]
    levels = []
    for depth in range(num_depths):
        is_node = is_some[depth] & ~np.repeat(is_all[depth - 1], 8) if depth > 1 else is_some[depth]
        codes = np.flatnonzero(is_node) if depth else np.zeros(1, np.int64)
        tokens = is_some[depth + 1].reshape(-1, 8)[codes] @ _BITS
        if 0 < depth < num_depths - 1:
            tokens[is_all[depth][codes]] = FULL
        levels.append((tokens.astype(np.uint8), np.full(len(codes), depth), codes))
    return Octree(*(np.concatenate(parts) for parts in zip(*levels, strict=True)))


def decode_octree(tokens: UInt8[np.ndarray, " nodes"], resolution: int) -> Bool[np.ndarray, " voxels"]:
    """The grid (R^3,) in Morton order that has these tokens, exactly.

    Raises DataError where they end too soon, go on after the end, or say what no octree says.
    """
    num_depths = _num_depths(resolution**3)
    occupancy = np.zeros(resolution**3, bool)
    codes, start = np.zeros(1, np.int64), 0
    for depth in range(num_depths):
        level = tokens[start : start + len(codes)]
        if len(level) < len(codes):
            raise DataError(
                f"the octree ends too soon: depth {depth} has {len(codes)} nodes and there are {len(level)} tokens left for them"
            )
        start += len(level)
        is_full = (level == FULL) & (depth > 0)
        if depth == num_depths - 1 and is_full.any():
            raise DataError(f"impossible octree: token {FULL} in the last depth, where a node has at least one voxel")
        occupancy.reshape(-1, 8 ** (num_depths - depth))[codes[is_full]] = True
        codes = next_nodes(level, codes)
    if start < len(tokens):
        raise DataError(f"the octree goes on after its end: {start} tokens belong to it, found {len(tokens)}")
    occupancy[codes] = True
    return occupancy


def next_nodes(
    tokens: UInt8[np.ndarray, " nodes"], codes: Int64[np.ndarray, " nodes"]
) -> Int64[np.ndarray, " children"]:
    """The Morton codes of the nodes one depth below, given those of a depth and their tokens; full nodes have none."""
    children = 8 * codes[:, None] + np.arange(8)
    return children[(tokens[:, None] & _BITS) > 0]


def _num_depths(num_voxels: int) -> int:
    num_depths = (num_voxels.bit_length() - 1) // 3
    if num_depths < 1 or num_voxels != 8**num_depths:
        raise ValueError(f"an octree needs 8^k voxels, k >= 1, found {num_voxels}")
    return num_depths
