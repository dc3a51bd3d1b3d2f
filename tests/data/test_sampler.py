"""The order of samples: permutations, balance, and independence of how the stream is cut among batches and ranks."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shapediff.data.sampler import DataOrder, rank_slice, sample_seed, sample_seeds
from shapediff.errors import ConfigError


@pytest.mark.parametrize("num_items", [1, 2, 17, 100])
def test_each_epoch_is_a_permutation(num_items: int) -> None:
    order = DataOrder(num_items, seed=3)
    for epoch in range(4):
        items = order.indices(epoch * num_items, num_items)
        np.testing.assert_array_equal(np.sort(items), np.arange(num_items))


def test_epochs_and_seeds_differ() -> None:
    orders = [DataOrder(50, seed=seed).indices(50 * epoch, 50) for seed in (0, 1) for epoch in (0, 1)]
    for i, first in enumerate(orders):
        for second in orders[i + 1 :]:
            assert (first != second).any()


@settings(deadline=None, max_examples=50)
@given(
    num_items=st.integers(1, 40),
    start=st.integers(0, 10_000),
    cuts=st.lists(st.integers(0, 30), min_size=1, max_size=5),
    balanced=st.booleans(),
)
def test_the_stream_does_not_depend_on_how_it_is_cut(
    num_items: int, start: int, cuts: list[int], balanced: bool
) -> None:
    labels = np.arange(num_items) % 3 if balanced else None
    whole = DataOrder(num_items, seed=5, balance_labels=labels).indices(start, sum(cuts))
    places = start + np.cumsum([0, *cuts])
    parts = [
        DataOrder(num_items, seed=5, balance_labels=labels).indices(int(place), count)
        for place, count in zip(places, cuts, strict=False)
    ]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_balanced_order_shows_every_class_equally_and_every_item_of_a_class_equally() -> None:
    labels = np.repeat([4, 0, 7], [1, 10, 30])
    order = DataOrder(41, seed=0, balance_labels=labels)
    items = order.indices(0, 3 * 60)
    for block in items.reshape(-1, 3):
        assert sorted(labels[block]) == [0, 4, 7]
    counts = np.bincount(items, minlength=41)
    np.testing.assert_array_equal(counts, np.repeat([60, 6, 2], [1, 10, 30]))


@settings(deadline=None, max_examples=30)
@given(
    weights=st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any),
    start=st.integers(0, 50),
    cut=st.integers(1, 30),
)
def test_weighted_order_shows_each_class_by_its_weight_and_its_items_equally(
    weights: list[int], start: int, cut: int
) -> None:
    labels = np.repeat([0, 1, 2], [2, 5, 10])
    order = DataOrder(17, seed=1, balance_labels=labels, weights=dict(enumerate(weights)))
    num_slots, num_rounds = sum(weights), 30  # 30 w draws of a class are whole epochs of 2, 5 and 10 items
    items = order.indices(start * num_slots, num_rounds * num_slots)
    for block in items.reshape(num_rounds, num_slots):
        np.testing.assert_array_equal(np.bincount(labels[block], minlength=3), weights)
    from_start = order.indices(0, num_rounds * num_slots)
    counts = np.bincount(from_start, minlength=17)
    np.testing.assert_array_equal(
        counts, np.repeat([30 * w // n for w, n in zip(weights, (2, 5, 10), strict=True)], [2, 5, 10])
    )
    parts = [order.indices(0, cut), order.indices(cut, num_rounds * num_slots - cut)]
    np.testing.assert_array_equal(np.concatenate(parts)[: len(from_start)], from_start)


def test_equal_weights_are_the_balanced_order_and_wrong_ones_an_error() -> None:
    labels = np.repeat([0, 1, 2], [2, 5, 10])
    plain = DataOrder(17, seed=1, balance_labels=labels).indices(0, 100)
    np.testing.assert_array_equal(DataOrder(17, seed=1, balance_labels=labels, weights={1: 1}).indices(0, 100), plain)
    for weights in ({0: 0, 1: 0, 2: 0}, {0: -1}):
        with pytest.raises(ConfigError, match="whole numbers of 0 or more"):
            DataOrder(17, seed=1, balance_labels=labels, weights=weights)


def test_balanced_order_changes_the_order_of_classes() -> None:
    labels = np.array([0, 1, 2])
    blocks = DataOrder(3, seed=0, balance_labels=labels).indices(0, 60).reshape(-1, 3)
    assert len({tuple(block) for block in blocks}) == 6


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_rank_slices_tile_the_global_batch(world_size: int) -> None:
    slices = [rank_slice(96, 32, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert [n for part in slices for n in part] == list(range(96, 128))


def test_uneven_batch_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch_size=10 cannot be shared by 4 ranks"):
        rank_slice(0, 10, rank=0, world_size=4)


def test_seeds_are_63_bits_distinct_and_pure() -> None:
    seeds = sample_seeds(11, np.arange(100_000))
    assert seeds.dtype == np.int64 and seeds.min() >= 0
    assert len(np.unique(seeds)) == len(seeds)
    assert sample_seed(11, 77_777) == seeds[77_777]
    assert sample_seed(12, 77_777) != seeds[77_777]
    # Each bit of a fair stream of n is set n/2 times, with a standard deviation of sqrt(n)/2: 6 of them allowed.
    bits = (seeds[:, None] >> np.arange(63)) & 1
    assert np.abs(bits.mean(0) - 0.5).max() < 6 * 0.5 / np.sqrt(len(seeds))


def test_splitmix64_reference_values() -> None:
    """Golden: the first outputs of the public-domain splitmix64.c (Vigna) seeded with 0, shifted to 63 bits."""
    reference = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    # Seed 0 is a fixed point of the mixing of the seed, so the stream of seed 0 is the reference's own.
    assert sample_seeds(0, np.arange(3)).tolist() == [value >> 1 for value in reference]


def test_no_item_is_an_error() -> None:
    with pytest.raises(ConfigError, match="split"):
        DataOrder(0, seed=0)
