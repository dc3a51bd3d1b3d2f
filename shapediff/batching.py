"""How many shapes are computed together: as many as the memory holds, and fewer where it turns out not to."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from shapediff.errors import ConfigError

log = logging.getLogger(__name__)

Item, Result = TypeVar("Item"), TypeVar("Result")

MAX_BATCH_SIZE = 64
"""A GPU has enough to do with these. The bound makes the size, and with it the rounding, the same on most GPUs."""
MAX_ON_CPU, VOXELS_ON_CPU = 16, 2**20
"""More gain little there, and come late; and so many voxels together, else they take gigabytes."""
PROBE_SIZE = 2
USABLE = 0.8
"""The share of the free memory that a batch may fill: allocators leave holes, and others use the GPU too."""


def in_batches(
    items: Sequence[Item], size: int, compute: Callable[[Sequence[Item], int], Result]
) -> Iterator[tuple[Sequence[Item], int, Result]]:
    """(part, size, compute(part, size)) for consecutive parts of `items`, all but the last of `size` items.

    Where memory runs out, `size` is halved for good and the part is done again. Raises ConfigError where one is too many.
    """
    done = 0
    while done < len(items):
        part = items[done : done + size]
        result = _unless_memory_runs_out(compute, part, size)
        if result is not None:
            done += len(part)
            yield part, size, result
            continue
        if size == 1:
            raise ConfigError(
                "memory ran out with one shape at a time: try --split-batch, --precision bf16, a device with more memory, "
                "or --device cpu"
            )
        log.warning("memory ran out with %d shapes at a time; going on with %d", size, size // 2)
        size //= 2
        torch.cuda.empty_cache()  # nothing where there is no GPU


def fitting_batch_size(device: torch.device, compute: Callable[[int], object]) -> int:
    """The largest power of two of samples, up to MAX_BATCH_SIZE, for which the free memory of a GPU should do.

    `compute(n)` does the work of n samples, or a part of it that needs as much memory.
    """
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    if _unless_memory_runs_out(lambda part, size: (compute(size),), (), PROBE_SIZE) is None:
        return 1
    per_sample = max(1, (torch.cuda.max_memory_allocated(device) - before) // PROBE_SIZE)
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return power_of_two_below(USABLE * free / per_sample, MAX_BATCH_SIZE)


def power_of_two_below(number: float, most: int) -> int:
    """The largest power of two that is at most `number` and `most`; 1 where that is less."""
    return 1 << max(0, int(min(number, most)).bit_length() - 1)


def _unless_memory_runs_out(
    compute: Callable[[Sequence[Item], int], Result], part: Sequence[Item], size: int
) -> Result | None:
    """None where it runs out: in here, so that the error's frames and their tensors are gone when one tries again."""
    try:
        return compute(part, size)
    except torch.cuda.OutOfMemoryError:
        return None
