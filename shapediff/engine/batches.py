"""What each rank trains on at each step: a pure function of the seed, the step and the rank, prepared a step ahead."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import count
from typing import cast

import numpy as np
import torch

from shapediff.data.dataset import ShapeDataset
from shapediff.data.sampler import DataOrder, rank_slice, sample_seeds
from shapediff.engine.config import TrainConfig
from shapediff.engine.latents import CachedLatents
from shapediff.methods.base import Batch


@dataclass(frozen=True)
class MicroBatch:
    """What one rank computes at once: the samples, and for each a seed and its place in the data set."""

    batch: Batch
    seeds: list[int]
    indices: list[int]

    def to(self, device: torch.device) -> MicroBatch:
        """The same on `device`."""
        here = {key: value.to(device, non_blocking=True) for key, value in self.batch.items()}  # type: ignore[attr-defined]
        return replace(self, batch=cast(Batch, here))


class Batches:
    """This rank's micro batches, step by step; a context manager, since a thread prepares the next step's meanwhile."""

    def __init__(
        self,
        dataset: ShapeDataset | CachedLatents,
        config: TrainConfig,
        *,
        first_step: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
    ) -> None:
        self._dataset = dataset
        self._config = config
        self._micro_batch_size = micro_batch_size
        self._rank, self._world_size = rank, world_size
        balance = dataset.labels if config.data.balance else None
        weights = config.data.label_weights(dataset.classes)
        self._order = DataOrder(len(dataset), seed=config.train.seed, balance_labels=balance, weights=weights)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="prefetch")
        self._steps = count(first_step)
        self._ready = self._pool.submit(self._prepare, next(self._steps))
        self.seconds_waited = 0.0
        """How long `take` has waited so far, all calls together."""

    def take(self) -> list[MicroBatch]:
        """The micro batches of the next optimizer step, the first being `first_step`; begins to prepare those after."""
        started = time.monotonic()
        ready = self._ready.result()
        self.seconds_waited += time.monotonic() - started
        self._ready = self._pool.submit(self._prepare, next(self._steps))
        return ready

    def _prepare(self, step: int) -> list[MicroBatch]:
        global_batch = self._config.train.batch_size
        mine = rank_slice(step * global_batch, global_batch, rank=self._rank, world_size=self._world_size)
        size = self._micro_batch_size
        return [self._micro_batch(np.arange(start, start + size)) for start in range(mine.start, mine.stop, size)]

    def _micro_batch(self, numbers: np.ndarray) -> MicroBatch:
        seeds = sample_seeds(self._config.train.seed, numbers)
        indices = self._order.indices(int(numbers[0]), len(numbers))
        data = self._config.data
        batch = self._dataset.batch(
            indices, mirror_seeds=seeds if data.mirror else None, turn_seeds=seeds if data.turn else None
        )
        return MicroBatch(cast(Batch, batch), seeds.tolist(), indices.tolist())

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)
