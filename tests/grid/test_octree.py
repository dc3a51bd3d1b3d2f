"""Octrees: exact inverses, counts known in closed form, a slow reference, and sequences that no grid has."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shapediff.errors import DataError
from shapediff.grid.morton import morton_decode, morton_encode
from shapediff.grid.octree import FULL, decode_octree, encode_octree, next_nodes


def grids(resolution: int) -> st.SearchStrategy[np.ndarray]:
    """Grids of voxels drawn one by one, and of whole cubes of side 2, so that some nodes are full."""
    fine = arrays(bool, resolution**3)
    return fine | arrays(bool, resolution**3 // 8).map(lambda coarse: np.repeat(coarse, 8))


def slow_tokens(occupancy: np.ndarray) -> list[int]:
    """By the definition, node after node, on the list of nodes that are left."""
    queue, tokens, is_root = [occupancy], [], True
    while queue:
        node = queue.pop(0)
        children = node.reshape(8, -1)
        if node.all() and not is_root and len(node) > 8:
            tokens.append(FULL)
        else:
            tokens.append(sum(1 << i for i, child in enumerate(children) if child.any()))
            queue += [child for child in children if child.any() and len(child) > 1]
        is_root = False
    return tokens


@given(grids(8) | grids(4) | grids(2))
def test_a_grid_comes_back_and_its_tokens_are_those_of_the_definition(occupancy: np.ndarray) -> None:
    octree = encode_octree(occupancy)
    assert octree.tokens.tolist() == slow_tokens(occupancy)
    resolution = round(len(occupancy) ** (1 / 3))
    assert (decode_octree(octree.tokens, resolution) == occupancy).all()


@given(grids(8))
def test_every_node_lies_where_its_code_says(occupancy: np.ndarray) -> None:
    octree = encode_octree(occupancy)
    assert (np.diff(octree.depths) >= 0).all()
    for depth in range(3):
        here = octree.depths == depth
        blocks = occupancy.reshape(8**depth, -1)
        assert (blocks[octree.codes[here]].any(1) | (depth == 0)).all()
        if depth < 2:
            below = octree.codes[octree.depths == depth + 1]
            assert (next_nodes(octree.tokens[here], octree.codes[here]) == below).all()


@pytest.mark.parametrize("resolution", [2, 4, 16])
def test_counts_known_in_advance(resolution: int) -> None:
    """An empty grid is its root, a full one nine nodes at most, and one voxel a path of log2 R nodes."""
    num_depths = int(np.log2(resolution))
    full, one = np.ones(resolution**3, bool), np.zeros(resolution**3, bool)
    one[-1] = True
    assert encode_octree(~full).tokens.tolist() == [0]
    assert encode_octree(full).tokens.tolist() == (
        [255] + [255 if num_depths == 2 else FULL] * 8 if resolution > 2 else [255]
    )
    assert encode_octree(one).tokens.tolist() == [128] * num_depths


def test_bits_are_children_with_x_lowest() -> None:
    """Voxel (1, 0, 0) of a 2^3 grid is child 1, (0, 1, 0) child 2 and (0, 0, 1) child 4."""
    for axis in range(3):
        place = np.eye(3, dtype=np.int64)[axis]
        occupancy = np.zeros(8, bool)
        occupancy[morton_encode(place[None])] = True
        assert encode_octree(occupancy).tokens.tolist() == [1 << (1 << axis)]
        assert (morton_decode(np.array([1 << axis])) == place).all()


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([], "ends too soon: depth 0"),
        ([3, 1], "ends too soon: depth 1 has 2 nodes and there are 1 tokens"),
        ([1, 1, 1], "goes on after its end: 2 tokens belong to it, found 3"),
        ([1, 0], "impossible octree: token 0 in the last depth"),
        ([0, 1], "goes on after its end"),
    ],
)
def test_a_sequence_that_no_grid_has(tokens: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        decode_octree(np.array(tokens, np.uint8), 4)


@pytest.mark.parametrize("num_voxels", [0, 1, 9, 27, 4096 * 2])
def test_other_numbers_of_voxels_are_refused(num_voxels: int) -> None:
    with pytest.raises(ValueError, match=r"8\^k"):
        encode_octree(np.zeros(num_voxels, bool))
