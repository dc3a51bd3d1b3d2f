"""The order of samples as a pure function of (seed, number of samples seen, rank).

Training draws samples 0, 1, 2, ... of one endless stream. Sample n has a place in the data set and a random
seed that depend on nothing else, so that resuming needs one number, and 2 ranks with half a batch each see
what 1 rank with the whole sees.

Random numbers are SplitMix64 (Steele et al. 2014, "Fast splittable pseudorandom number generators", fig. 17),
which allows jumping to any place of a stream and does not change between library versions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache

import numpy as np
from jaxtyping import Int64, Integer, UInt64

from shapediff.errors import ConfigError

_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
# "order" and "slot": they keep these streams apart from the samples' own seeds.
_ORDER_SALT, _SLOT_SALT = 0x6F72646572, 0x736C6F74


class DataOrder:
    """Which item of the data set each global sample number n = 0, 1, 2, ... takes.

    Plain: every `num_items` samples are a permutation of the items, drawn from (seed, epoch). Balanced, given the
    `balance_labels` (num_items,) of the items: every C consecutive samples (C classes that occur) hold each class once, and
    the items of a class come as permutations one after the other. With `weights` a class of weight w is w times in every sum
    of all weights; a label that they do not name has weight 1, and of weight 0 nothing is drawn.
    """

    def __init__(
        self,
        num_items: int,
        *,
        seed: int,
        balance_labels: Sequence[int] | np.ndarray | None = None,
        weights: Mapping[int, int] | None = None,
    ) -> None:
        if num_items < 1:
            raise ConfigError("there is no item to draw from; is the split of the data set empty?")
        groups = [np.arange(num_items)]
        if balance_labels is not None:
            labels = np.asarray(balance_labels)
            if labels.shape != (num_items,):
                raise ConfigError(
                    f"balance_labels has shape {labels.shape}; give one label for each of {num_items} items"
                )
            copies = {int(label): (weights or {}).get(int(label), 1) for label in np.unique(labels)}
            if min(copies.values()) < 0 or not any(copies.values()):
                raise ConfigError(f"weights={dict(weights or {})}; use whole numbers of 0 or more, and not 0 for all")
            copies = {label: num for label, num in copies.items() if num}
            groups = [np.flatnonzero(labels == label) for label in copies]
        self.num_items = num_items
        self._groups = groups
        # A round is a permutation of the slots; slot i is draw number `_slot_copy[i]` of its class in that round.
        self._copies = np.array([1] if balance_labels is None else list(copies.values()))
        self._slot_group = np.repeat(np.arange(len(groups)), self._copies)
        self._slot_copy = np.concatenate([np.arange(num) for num in self._copies])
        self._slot_seed = sample_seed(seed ^ _SLOT_SALT, 0)
        self._group_seeds = [sample_seed(seed ^ _ORDER_SALT, i) for i in range(len(groups))]

    def indices(self, start: int, count: int) -> Int64[np.ndarray, " count"]:
        """The items of samples start, ..., start + count - 1."""
        numbers = np.arange(start, start + count, dtype=np.int64)
        groups, draws = self._draws(numbers)
        items = np.empty(count, dtype=np.int64)
        for group in np.unique(groups):
            chosen = groups == group
            items[chosen] = self._draw(int(group), draws[chosen])
        return items

    def _draws(self, numbers: Int64[np.ndarray, " n"]) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """(group of each sample, how many of its group were drawn before it)."""
        num_slots = len(self._slot_group)
        if num_slots == 1:
            return np.zeros(len(numbers), dtype=np.int64), numbers
        rounds, places = np.divmod(numbers, num_slots)
        keys = sample_seeds(self._slot_seed, rounds[:, None] * num_slots + np.arange(num_slots))
        slots = np.argsort(keys, axis=1, kind="stable")[np.arange(len(numbers)), places]
        groups = self._slot_group[slots]
        return groups, rounds * self._copies[groups] + self._slot_copy[slots]

    def _draw(self, group: int, draws: Int64[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
        members = self._groups[group]
        epochs, places = np.divmod(draws, len(members))
        chosen = np.empty(len(draws), dtype=np.int64)
        for epoch in np.unique(epochs):
            now = epochs == epoch
            chosen[now] = members[
                _permutation(len(members), sample_seed(self._group_seeds[group], int(epoch)))[places[now]]
            ]
        return chosen


def rank_slice(start: int, global_batch: int, *, rank: int, world_size: int) -> range:
    """The sample numbers of one rank in the global batch that begins at sample `start`: a contiguous part of
    it.

    Raises ConfigError unless the ranks share the batch evenly.
    """
    if global_batch % world_size:
        raise ConfigError(
            f"batch_size={global_batch} cannot be shared by {world_size} ranks; use a multiple of "
            f"{world_size}, such as {max(1, round(global_batch / world_size)) * world_size}"
        )
    if not 0 <= rank < world_size:
        raise ConfigError(f"rank={rank} is not in [0, {world_size})")
    local_batch = global_batch // world_size
    return range(start + rank * local_batch, start + (rank + 1) * local_batch)


def sample_seed(seed: int, number: int) -> int:
    """The seed in [0, 2^63) of sample `number` under a run's seed (any integer)."""
    return int(sample_seeds(seed, np.array([number]))[0])


def sample_seeds(seed: int, numbers: Integer[np.ndarray, "..."]) -> Int64[np.ndarray, "..."]:
    """`sample_seed` of each of the numbers, int64: outputs of the SplitMix64 stream of the mixed seed."""
    base = _finalise(np.array([seed & _MASK], dtype=np.uint64))
    states = base + (numbers.astype(np.uint64) + np.uint64(1)) * np.uint64(_GOLDEN_GAMMA)
    return (_finalise(states) >> np.uint64(1)).astype(np.int64)


def _finalise(words: UInt64[np.ndarray, "..."]) -> UInt64[np.ndarray, "..."]:
    words = (words ^ (words >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    words = (words ^ (words >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return words ^ (words >> np.uint64(31))


# A batch touches one or two epochs of each class; the cache spares sorting them again for every batch.
@lru_cache(maxsize=256)
def _permutation(length: int, seed: int) -> Int64[np.ndarray, " length"]:
    return np.argsort(sample_seeds(seed, np.arange(length)), kind="stable")
