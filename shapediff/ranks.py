"""Which of several processes this one is, as torchrun and DeepSpeed's launcher say it in the environment."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from shapediff.errors import ConfigError

Item = TypeVar("Item")


@dataclass(frozen=True)
class Ranks:
    """This process is `rank` of `world_size`, and `local_rank` of the `local_world_size` on its machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    def __post_init__(self) -> None:
        if not (0 <= self.rank < self.world_size and 0 <= self.local_rank < self.local_world_size):
            raise ConfigError(
                f"RANK={self.rank} of WORLD_SIZE={self.world_size}, LOCAL_RANK={self.local_rank} of {self.local_world_size} "
                "do not fit each other; start with torchrun or deepspeed, or without these variables"
            )

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that reports."""
        return self.rank == 0

    def share(self, items: Sequence[Item]) -> list[Item]:
        """What this process does of `items`: every `world_size`-th, so that no process need hear of another."""
        return list(items[self.rank :: self.world_size])

    def use_device(self, asked: str | None = None) -> torch.device:
        """The device asked for; without, or for "cuda", this process's GPU, else the CPU and this process's part of its cores."""
        if asked in (None, "cuda") and torch.cuda.is_available():
            device = torch.device("cuda", self.local_rank % torch.cuda.device_count())
            torch.cuda.set_device(device)
            return device
        if self.local_world_size > 1 and "OMP_NUM_THREADS" not in os.environ:
            # More threads than cores slow every process manyfold.
            torch.set_num_threads(max(1, torch.get_num_threads() // self.local_world_size))
        return torch.device(asked or "cpu")


def ranks_from(environment: Mapping[str, str]) -> Ranks:
    """The ranks that a launcher set up; a single process where there is none. Raises ConfigError for what is no number."""
    if "RANK" not in environment or "WORLD_SIZE" not in environment:
        return Ranks()
    try:
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", rank))
        # torchrun, DeepSpeed's launcher, neither.
        names = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "WORLD_SIZE")
        local_world_size = int(next(environment[name] for name in names if name in environment))
    except ValueError as error:
        raise ConfigError(f"RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE must be numbers: {error}") from error
    return Ranks(rank, world_size, local_rank, local_world_size)
