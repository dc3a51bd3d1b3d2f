"""Grids as sequences of tokens for a transformer, and the walk that rebuilds a grid token by token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from shapediff.grid.morton import morton_decode
from shapediff.grid.octree import FULL, decode_octree, encode_octree, next_nodes
from shapediff.models.octree_transformer import NUM_TOKENS, START, Nodes

_TOKENS, _BITS = np.arange(NUM_TOKENS), 1 << np.arange(8)


@dataclass(frozen=True)
class NodeList:
    """Nodes of one grid in order: `depths`, Morton `codes` at that depth, tokens of the `parents` (START: none), (n,) int64."""

    depths: Int[np.ndarray, " n"]
    codes: Int[np.ndarray, " n"]
    parents: Int[np.ndarray, " n"]


Agreeing = Callable[[NodeList], Bool[np.ndarray, " tokens"]]


class Tokenizer(Protocol):
    """One way to write a grid as tokens."""

    resolution: int

    def encode(self, occupancy: Bool[np.ndarray, " voxels"]) -> tuple[Int[np.ndarray, " n"], NodeList]:
        """The tokens of a Morton-ordered grid, and the nodes that they belong to."""

    def decode(self, tokens: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " voxels"]:
        """The grid again. Raises DataError for what no grid gives."""

    def first(self) -> NodeList:
        """The nodes that are known before any token is."""

    def below(self, tokens: Int[np.ndarray, " n"], nodes: NodeList) -> NodeList:
        """The nodes that follow when all of `nodes`, the last ones known, have their tokens; none at the end."""

    def possible(self) -> Bool[Tensor, "depths tokens"]:
        """Which tokens a node of each depth can have."""

    def agreeing(self, occupancy: Bool[np.ndarray, " voxels"], keep: Bool[np.ndarray, " voxels"]) -> Agreeing:
        """Which tokens a single node may have where the voxels in `keep` are as in `occupancy`; for all nodes that they lead to
        there is one, and at the end these voxels are exactly so."""


class OctreeTokens:
    """Eight child bits a node, coarse to fine (see `shapediff.grid.octree`)."""

    def __init__(self, resolution: int) -> None:
        self.resolution = resolution
        self.num_depths = resolution.bit_length() - 1

    def encode(self, occupancy: Bool[np.ndarray, " voxels"]) -> tuple[Int[np.ndarray, " n"], NodeList]:
        octree = encode_octree(occupancy)
        tokens = octree.tokens.astype(np.int64)
        parents = np.full(len(tokens), START)
        for depth in range(1, self.num_depths):
            here, above = (np.flatnonzero(octree.depths == d) for d in (depth, depth - 1))
            parents[here] = tokens[above][np.searchsorted(octree.codes[above], octree.codes[here] // 8)]
        return tokens, NodeList(octree.depths, octree.codes, parents)

    def decode(self, tokens: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " voxels"]:
        return decode_octree(tokens.astype(np.uint8), self.resolution)

    def first(self) -> NodeList:
        return NodeList(np.zeros(1, np.int64), np.zeros(1, np.int64), np.full(1, START))

    def below(self, tokens: Int[np.ndarray, " n"], nodes: NodeList) -> NodeList:
        depth = int(nodes.depths[0]) + 1
        if depth == self.num_depths:
            return NodeList(*(np.zeros(0, np.int64),) * 3)
        codes = next_nodes(tokens.astype(np.uint8), nodes.codes)
        parents = tokens[np.searchsorted(nodes.codes, codes // 8)]
        return NodeList(np.full(len(codes), depth), codes, parents)

    def possible(self) -> Bool[Tensor, "depths tokens"]:
        table = torch.ones(self.num_depths, NUM_TOKENS, dtype=torch.bool)
        table[1:][-1:, 0] = False  # the last depth, where that is not the root's
        return table

    def agreeing(self, occupancy: Bool[np.ndarray, " voxels"], keep: Bool[np.ndarray, " voxels"]) -> Agreeing:
        # Of the children of each node: the bits that must be set, and those that may; of the node: whether it may be full.
        must, may, may_be_full = [], [], []
        for depth in range(self.num_depths):
            inside = (keep & occupancy).reshape(8**depth, 8, -1).any(2)
            free = (~keep).reshape(8**depth, 8, -1).any(2)
            must.append(inside @ _BITS)
            may.append((inside | free) @ _BITS)
            may_be_full.append(~(keep & ~occupancy).reshape(8**depth, -1).any(1))

        def tokens_of(node: NodeList) -> Bool[np.ndarray, " tokens"]:
            depth, code = int(node.depths[0]), int(node.codes[0])
            agrees = (_TOKENS & must[depth][code] == must[depth][code]) & (_TOKENS & ~may[depth][code] == 0)
            if depth:
                agrees[FULL] = depth < self.num_depths - 1 and may_be_full[depth][code]
            return agrees

        return tokens_of


class VoxelTokens:
    """The textbook sequence: 0 or 1 for each voxel in Morton order."""

    def __init__(self, resolution: int) -> None:
        self.resolution = resolution

    def encode(self, occupancy: Bool[np.ndarray, " voxels"]) -> tuple[Int[np.ndarray, " n"], NodeList]:
        return occupancy.astype(np.int64), self.first()

    def decode(self, tokens: Int[np.ndarray, " n"]) -> Bool[np.ndarray, " voxels"]:
        return tokens.astype(bool)

    def first(self) -> NodeList:
        num = self.resolution**3
        return NodeList(np.full(num, self.resolution.bit_length() - 1), np.arange(num), np.full(num, START))

    def below(self, tokens: Int[np.ndarray, " n"], nodes: NodeList) -> NodeList:
        return NodeList(*(np.zeros(0, np.int64),) * 3)

    def possible(self) -> Bool[Tensor, "depths tokens"]:
        table = torch.zeros(self.resolution.bit_length(), NUM_TOKENS, dtype=torch.bool)
        table[:, :2] = True
        return table

    def agreeing(self, occupancy: Bool[np.ndarray, " voxels"], keep: Bool[np.ndarray, " voxels"]) -> Agreeing:
        def tokens_of(node: NodeList) -> Bool[np.ndarray, " tokens"]:
            code = int(node.codes[0])
            return (occupancy[code] == _TOKENS) if keep[code] else _TOKENS < 2

        return tokens_of


TOKENIZERS: dict[str, type[OctreeTokens] | type[VoxelTokens]] = {"octree": OctreeTokens, "voxels": VoxelTokens}


@dataclass(frozen=True)
class Sequences:
    """A batch for the transformer, one sequence after the other in a row: tokens (1, n), what stands before each, its nodes."""

    tokens: Int[Tensor, "1 n"]
    before: Int[Tensor, "1 n"]
    sources: Nodes
    nodes: Nodes
    lengths: tuple[int, ...]


def sequences_of(signal: Float[Tensor, "b voxels"], tokenizer: Tokenizer) -> Sequences:
    """The sequences of Morton-ordered signals, inside where positive, on their device."""
    encoded = [tokenizer.encode(grid) for grid in (signal > 0).cpu().numpy()]
    lengths = tuple(len(tokens) for tokens, _ in encoded)
    starts = torch.tensor(lengths).cumsum(0) - torch.tensor(lengths)
    tokens = torch.from_numpy(np.concatenate([tokens for tokens, _ in encoded]))
    nodes = nodes_of(joined_nodes([found for _, found in encoded]), tokenizer.resolution)
    source = torch.arange(len(tokens)) - 1
    source[starts] += 1  # before the first node stands the first itself
    before = tokens[source]
    before[starts] = START

    def row(value: Tensor) -> Tensor:
        return value[None].to(signal.device)

    return Sequences(row(tokens), row(before), nodes.map(lambda v: row(v[source])), nodes.map(row), lengths)


def joined_nodes(lists: Sequence[NodeList]) -> NodeList:
    """One list after the other."""
    return NodeList(
        *(np.concatenate(parts) for parts in zip(*((n.depths, n.codes, n.parents) for n in lists), strict=True))
    )


def nodes_of(found: NodeList, resolution: int) -> Nodes:
    """Nodes as the transformer sees them, without a batch axis."""
    side = resolution / 2.0**found.depths
    centres = (morton_decode(found.codes) + 0.5) * side[:, None]
    as_tensor = torch.from_numpy
    return Nodes(
        as_tensor(centres).float(), as_tensor(found.depths), as_tensor(found.codes % 8), as_tensor(found.parents)
    )
