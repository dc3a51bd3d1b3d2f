"""Morton order against a bit-by-bit reference and against the dense grid."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from einops import rearrange, reduce
from hypothesis import given
from hypothesis import strategies as st

from shapediff.grid import morton
from shapediff.grid.morton import dense_to_morton, morton_decode, morton_encode, morton_to_dense

KINDS: dict[str, Callable[[np.ndarray], Any]] = {"numpy": np.asarray, "torch": torch.from_numpy}


def slow_encode(x: int, y: int, z: int) -> int:
    return sum(((x >> i & 1) | (y >> i & 1) << 1 | (z >> i & 1) << 2) << 3 * i for i in range(21))


@given(st.lists(st.tuples(*[st.integers(0, 2**21 - 1)] * 3), min_size=1, max_size=20))
def test_codes_are_the_interleaved_bits(coords: list[tuple[int, int, int]]) -> None:
    expected = [slow_encode(*c) for c in coords]
    for kind in KINDS.values():
        codes = morton_encode(kind(np.array(coords)))
        assert codes.tolist() == expected
        assert morton_decode(codes).tolist() == [list(c) for c in coords]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bits", [10, 21])
def test_the_whole_range_of_bits(kind: str, bits: Any) -> None:
    rng, top = np.random.default_rng(0), 2**bits - 1
    coords = np.concatenate(
        [rng.integers(0, top + 1, (1000, 3)), [[0, 0, 0], [top, top, top], [top, 0, 0], [0, 0, top]]]
    )
    codes = morton_encode(KINDS[kind](coords), bits=bits)
    assert codes.tolist() == [slow_encode(*map(int, c)) for c in coords]
    assert str(codes.dtype).endswith("int32" if bits == 10 else "int64")
    assert morton_decode(codes, bits=bits).tolist() == coords.tolist()


def test_x_is_the_lowest_bit() -> None:
    first = [[0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0], [0, 0, 1], [1, 0, 1], [0, 1, 1], [1, 1, 1], [2, 0, 0]]
    assert morton_decode(np.arange(9)).tolist() == first


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("resolution", [1, 2, 8, 32])
def test_dense_there_and_back(kind: str, resolution: int) -> None:
    dense = np.random.default_rng(0).random((2, 3, *[resolution] * 3)).astype(np.float32)
    flat = dense_to_morton(KINDS[kind](dense))
    assert flat.shape == (2, 3, resolution**3)
    x, y, z = morton_decode(np.arange(resolution**3)).T
    assert np.array_equal(np.asarray(flat), dense[..., x, y, z])
    assert np.array_equal(np.asarray(morton_to_dense(flat)), dense)


def test_a_table_first_used_in_inference_serves_training() -> None:
    morton._device_tables.clear()
    dense = torch.rand(4, 4, 4, requires_grad=True)
    with torch.inference_mode():
        dense_to_morton(dense)
    dense_to_morton(dense).square().sum().backward()
    torch.testing.assert_close(dense.grad, 2 * dense.detach())


def test_works_for_booleans_and_under_autograd() -> None:
    mask = torch.rand(8, 8, 8) > 0.5
    assert torch.equal(morton_to_dense(dense_to_morton(mask)), mask)
    dense = torch.rand(2, 4, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(dense_to_morton, dense)


@pytest.mark.parametrize("p", [1, 2, 4, 8])
def test_patches_are_cubes_and_a_view(p: int) -> None:
    dense = torch.rand(2, 8, 8, 8)
    flat = dense_to_morton(dense)
    cubes = morton.patches(flat, p)
    assert cubes.data_ptr() == flat.data_ptr()
    expected = rearrange(dense, "b (x i) (y j) (z k) -> b x y z i j k", i=p, j=p, k=p)
    expected = dense_to_morton(rearrange(expected, "b x y z i j k -> b i j k x y z"))
    expected = dense_to_morton(rearrange(expected, "b i j k n -> b n i j k"))
    assert torch.equal(cubes, expected)
    assert torch.equal(morton.unpatch(cubes), flat)


def test_windows_hold_the_tokens_of_a_cube() -> None:
    coords = morton_decode(torch.arange(512))
    windows = morton.windows(coords, 4)
    assert windows.shape == (8, 64, 3)
    for window in windows:
        assert torch.equal(window.amax(0) - window.amin(0), torch.tensor([3, 3, 3]))
        assert not (window.amin(0) % 4).any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("op", ["mean", "max"])
def test_pooling_is_that_of_the_dense_grid(kind: str, op: Any) -> None:
    dense = np.random.default_rng(0).random((3, 8, 8, 8))
    expected = reduce(dense, "b (x i) (y j) (z k) -> b x y z", op, i=2, j=2, k=2)
    pooled = morton.pool(dense_to_morton(KINDS[kind](dense)), op)
    np.testing.assert_allclose(np.asarray(morton_to_dense(pooled)), expected, rtol=1e-15)
    assert np.array_equal(np.asarray(morton.pool(morton.unpool(pooled), "max")), np.asarray(pooled))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_flips_and_turns_are_those_of_the_dense_grid(kind: str, axis: int) -> None:
    dense = np.random.default_rng(0).random((2, 8, 8, 8))
    flat = dense_to_morton(KINDS[kind](dense))
    flipped = morton.permute(flat, morton.flip_permutation(8, axis))
    assert np.array_equal(np.asarray(morton_to_dense(flipped)), np.flip(dense, axis + 1))
    for k in range(-1, 5):
        turned = morton.permute(flat, morton.rotate90_permutation(8, axis, k))
        expected = np.rot90(dense, k, ((axis + 1) % 3 + 1, (axis + 2) % 3 + 1))
        assert np.array_equal(np.asarray(morton_to_dense(turned)), expected)


def test_turns_and_flips_form_their_group() -> None:
    identity = np.arange(512)
    flips = [morton.flip_permutation(8, axis) for axis in range(3)]
    turns = [morton.rotate90_permutation(8, axis) for axis in range(3)]
    for flip, turn in zip(flips, turns, strict=True):
        assert np.array_equal(flip[flip], identity)
        assert np.array_equal(turn[turn][turn[turn]], identity)
    # A half turn about z is a flip of x and of y.
    assert np.array_equal(turns[2][turns[2]], flips[0][flips[1]])
    # About y a quarter turn moves +z to +x.
    grid = np.zeros((8, 8, 8))
    grid[3, 3, 7] = 1
    turned = morton_to_dense(morton.permute(dense_to_morton(grid), turns[1]))
    assert np.argwhere(turned).tolist() == [[7, 3, 4]]


def test_refuses_what_is_no_grid_or_code() -> None:
    with pytest.raises(ValueError, match="shape"):
        morton_encode(np.zeros((3, 2), int))
    with pytest.raises(ValueError, match="integers"):
        morton_encode(np.zeros((1, 3)))
    with pytest.raises(ValueError, match="out of range"):
        morton_encode(np.array([[-1, 0, 0]]))
    with pytest.raises(ValueError, match="out of range"):
        morton_encode(torch.tensor([[0, 0, 1024]]), bits=10)
    with pytest.raises(ValueError, match="out of range"):
        morton_decode(torch.tensor([-1]))
    with pytest.raises(ValueError, match="shape"):
        dense_to_morton(np.zeros((4, 4, 8)))
    for num_voxels in (10, 27, 1000):
        with pytest.raises(ValueError, match="power of two"):
            morton_to_dense(np.zeros(num_voxels))
    with pytest.raises(ValueError, match="power of two"):
        dense_to_morton(np.zeros((3, 3, 3)))
    with pytest.raises(ValueError, match="patch_size"):
        morton.patches(np.zeros(64), 3)
    with pytest.raises(ValueError, match="window_size"):
        morton.windows(np.zeros((8, 2)), 4)
    with pytest.raises(ValueError, match="axis"):
        morton.flip_permutation(8, 3)
