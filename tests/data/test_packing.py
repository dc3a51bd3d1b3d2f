"""The bits on disk: their order, exact round trips, and lower resolutions as plain pooling of the dense grid."""

from __future__ import annotations

import numpy as np
import pytest

from shapediff.data.packing import fill_fraction, pack_grid, row_length, unpack_signal
from shapediff.grid.morton import dense_to_morton, morton_to_dense


def random_occupancy(resolution: int, seed: int = 0, chance: float = 0.3) -> np.ndarray:
    return np.random.default_rng(seed).random((resolution,) * 3) < chance


def random_tsdf(resolution: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).uniform(-1, 1, (resolution,) * 3).astype(np.float32)


@pytest.mark.parametrize(("x", "y", "z"), [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 1, 1), (2, 3, 1)])
def test_bit_of_a_voxel_is_its_morton_code(x: int, y: int, z: int) -> None:
    grid = np.zeros((4, 4, 4), dtype=bool)
    grid[x, y, z] = True
    code = sum((x >> i & 1) << 3 * i | (y >> i & 1) << 3 * i + 1 | (z >> i & 1) << 3 * i + 2 for i in range(2))
    expected = np.zeros(8, dtype=np.uint8)
    expected[code // 8] = 1 << code % 8
    np.testing.assert_array_equal(pack_grid(grid, field="occupancy"), expected)


@pytest.mark.parametrize("resolution", [2, 8, 16])
def test_occupancy_round_trip_is_exact(resolution: int) -> None:
    grid = random_occupancy(resolution)
    row = pack_grid(grid, field="occupancy")
    assert row.shape == (row_length(resolution, "occupancy"),)
    signal = morton_to_dense(unpack_signal(row[None], field="occupancy"))[0]
    assert signal.dtype == np.float32
    np.testing.assert_array_equal(signal, np.where(grid, 1.0, -1.0))


def test_tsdf_round_trip_is_within_its_step_and_keeps_the_inside() -> None:
    tsdf = random_tsdf(16)
    tsdf[0, 0, :4] = (-1e-6, 1e-6, -1.0, 1.0)
    signal = morton_to_dense(unpack_signal(pack_grid(tsdf, field="tsdf")[None], field="tsdf"))[0]
    # Rounding to 1/127 errs by half a step, pushing small negative values out by one: at most 1/127.
    np.testing.assert_allclose(signal, -tsdf, atol=1 / 127 + 1e-6)
    np.testing.assert_array_equal(signal > 0, tsdf < 0)
    assert np.abs(signal).max() <= 1.0


@pytest.mark.parametrize("num_halvings", [1, 2, 3])
def test_pooled_occupancy_is_the_dense_maximum(num_halvings: int) -> None:
    grid = random_occupancy(16, chance=0.02)
    side = 2**num_halvings
    coarse = 16 // side
    expected = grid.reshape(coarse, side, coarse, side, coarse, side).any(axis=(1, 3, 5))
    row = pack_grid(grid, field="occupancy")
    signal = unpack_signal(row[None], field="occupancy", num_halvings=num_halvings)[0]
    np.testing.assert_array_equal(signal, dense_to_morton(np.where(expected, 1.0, -1.0)))


@pytest.mark.parametrize("num_halvings", [1, 2])
def test_pooled_tsdf_is_the_dense_mean(num_halvings: int) -> None:
    row = pack_grid(random_tsdf(8), field="tsdf")
    side = 2**num_halvings
    coarse = 8 // side
    fine = morton_to_dense(unpack_signal(row[None], field="tsdf"))[0]
    expected = fine.reshape(coarse, side, coarse, side, coarse, side).mean(axis=(1, 3, 5))
    signal = unpack_signal(row[None], field="tsdf", num_halvings=num_halvings)[0]
    np.testing.assert_allclose(signal, dense_to_morton(expected), atol=1e-6)  # float32 sums in another order


def test_fill_fraction_counts_the_inside() -> None:
    grid, tsdf = random_occupancy(8), random_tsdf(8)
    assert fill_fraction(pack_grid(grid, field="occupancy")[None], field="occupancy")[0] == grid.mean()
    assert fill_fraction(pack_grid(tsdf, field="tsdf")[None], field="tsdf")[0] == (tsdf < 0).mean()
