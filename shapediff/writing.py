"""Meshes and their files, made beside the sampling: a GPU would wait for them longer than it takes to sample."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch

from shapediff.gallery import Gallery, Line
from shapediff.geometry.printable import MeshOptions
from shapediff.ranks import Ranks
from shapediff.shapes import Shapes

MAX_WORKERS = 8
WORTH_WORKERS = 32
"""Shapes from which on processes pay, which take two seconds to start."""
MAX_PENDING = 256
"""Shapes that wait for their mesh at most, in memory."""


class Writer:
    """Writes shapes into a gallery, each a mesh file and then its line: at once, or in the processes of `executor`."""

    def __init__(self, gallery: Gallery, format: str, options: MeshOptions, executor: Executor | None = None) -> None:
        self._gallery, self._format, self._options, self._executor = gallery, format, options, executor
        self._pending: deque[Future[Line]] = deque()

    def put(self, shapes: Shapes) -> None:
        """Write these shapes, or have them written while the caller goes on."""
        if self._executor is None:
            for line in shapes.write(self._gallery.directory, self._format, self._options):
                self._gallery.add(line)
            return
        for i in range(len(shapes)):
            facts = (shapes.names[i], shapes.classes[i], shapes.seeds[i], shapes.settings)
            # As an array: a tensor would go through shared memory, of which containers have little.
            to = (self._gallery.directory, self._format, self._options)
            self._pending.append(self._executor.submit(_write, shapes.voxels[i].numpy(), *facts, *to))
        self.take(keep=MAX_PENDING)

    def take(self, *, keep: int = 0) -> None:
        """Put down what is written, waiting until at most `keep` are not."""
        while self._pending and (self._pending[0].done() or len(self._pending) > keep):
            self._gallery.add(self._pending.popleft().result())

    def take_what_is_done(self) -> None:
        """Put down what is written, and wait for nothing: the processes may have been stopped, too."""
        for future in self._pending:
            if future.done() and not future.cancelled() and future.exception() is None:
                self._gallery.add(future.result())
        self._pending.clear()


@contextmanager
def open_writer(
    gallery: Gallery, format: str, options: MeshOptions, *, num: int, device: torch.device, ranks: Ranks
) -> Iterator[Writer]:
    """A writer for `num` shapes; `take` waits for all. Where the caller is stopped, what is written by then is put down."""
    workers = num_workers(num, device, ranks)
    if not workers:
        yield Writer(gallery, format, options)
        return
    context = multiprocessing.get_context("spawn")  # a fork of a process that uses a GPU cannot work
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_leave_signals_to_the_main_process)
    writer = Writer(gallery, format, options, executor)
    try:
        yield writer
    except KeyboardInterrupt:
        writer.take_what_is_done()
        raise
    finally:
        executor.shutdown(cancel_futures=True)


def num_workers(num: int, device: torch.device, ranks: Ranks) -> int:
    """Processes to write `num` shapes: none beside a CPU that samples, else this rank's share of the other cores."""
    if device.type == "cpu" or num < WORTH_WORKERS:
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(0, min(MAX_WORKERS, cores // ranks.local_world_size - 1))


def _write(
    voxels: np.ndarray,
    name: str,
    label: str | None,
    seed: int,
    settings: dict[str, object],
    directory: Path,
    format: str,
    options: MeshOptions,
) -> Line:
    shapes = Shapes(torch.from_numpy(voxels)[None], (name,), (label,), (seed,), settings)
    (line,) = shapes.write(directory, format, options)
    return line


def _leave_signals_to_the_main_process() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
