"""Mirror images and turns against the same moves of the dense grid."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shapediff.data.augment import mirror_coins, mirror_rows, mirror_x, turn_choices, turn_rows, turn_y
from shapediff.data.manifest import Field
from shapediff.data.packing import pack_grid, unpack_signal
from shapediff.data.sampler import sample_seeds
from shapediff.grid.morton import dense_to_morton, morton_to_dense

DENSE = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 8)).astype(np.float32)


def test_mirror_is_the_dense_flip_and_its_own_inverse() -> None:
    flat = dense_to_morton(DENSE)
    np.testing.assert_array_equal(morton_to_dense(mirror_x(flat)), DENSE[:, ::-1])
    np.testing.assert_array_equal(mirror_x(mirror_x(flat)), flat)


@pytest.mark.parametrize("k", [-1, 0, 1, 2, 3, 5])
def test_turns_are_the_dense_turns_about_y(k: int) -> None:
    flat = torch.from_numpy(dense_to_morton(DENSE))
    expected = np.rot90(DENSE, k, axes=(3, 1))
    np.testing.assert_array_equal(morton_to_dense(turn_y(flat, k)).numpy(), expected)


def test_one_turn_moves_the_front_to_the_right() -> None:
    front = np.zeros((4, 4, 4), dtype=np.float32)
    front[:, :, 3] = 1.0
    assert (morton_to_dense(turn_y(dense_to_morton(front), 1))[3] == 1.0).all()


@pytest.mark.parametrize("field", ["occupancy", "tsdf"])
def test_mirrored_rows_unpack_to_the_mirrored_signal(field: Field) -> None:
    grids = DENSE < 0 if field == "occupancy" else DENSE
    rows = np.stack([pack_grid(grid, field=field) for grid in grids])
    mirrored = unpack_signal(mirror_rows(rows, field=field), field=field)
    np.testing.assert_array_equal(mirrored, mirror_x(unpack_signal(rows, field=field)))


@pytest.mark.parametrize("field", ["occupancy", "tsdf"])
@pytest.mark.parametrize("k", [0, 1, 2, 3])
def test_turned_rows_unpack_to_the_turned_signal(field: Field, k: int) -> None:
    grids = DENSE < 0 if field == "occupancy" else DENSE
    rows = np.stack([pack_grid(grid, field=field) for grid in grids])
    turned = unpack_signal(turn_rows(rows, k, field=field), field=field)
    np.testing.assert_array_equal(turned, turn_y(unpack_signal(rows, field=field), k))


def test_turns_are_fair_and_do_not_follow_the_coins() -> None:
    seeds = sample_seeds(0, np.arange(10_000))
    counts = np.bincount(4 * mirror_coins(seeds) + turn_choices(seeds), minlength=8)
    assert np.abs(counts - 1250).max() < 6 * np.sqrt(1250)


def test_coins_are_fair_and_follow_the_seeds() -> None:
    seeds = sample_seeds(0, np.arange(10_000))
    coins = mirror_coins(seeds)
    assert abs(coins.mean() - 0.5) < 6 * 0.5 / 100  # 6 standard deviations
    np.testing.assert_array_equal(mirror_coins(seeds[5:9]), coins[5:9])
