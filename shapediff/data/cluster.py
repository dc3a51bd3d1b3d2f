"""The jobs of `workers.run_jobs` on the machines of a Dask cluster.

Dask and not Ray: its scheduler and workers are plain Python programs that come with every batch system's recipes (dask-jobqueue,
Slurm, Kubernetes), need no daemon or object store, and a job that was on a machine that died is given to another.
"""

from __future__ import annotations

import platform
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import CancelledError
from contextlib import contextmanager
from typing import Any

from shapediff.data.workers import JobLost, Worker
from shapediff.errors import ConfigError, DataError, ShapediffError

_CONNECT_SECONDS = 30
_LOOK_SECONDS = 1.0
_PATIENCE_SECONDS = 120.0
"""How long the cluster may be without a worker before the run ends: batch systems and `dask worker` start lost ones again."""
_here = threading.local()


def run_jobs_on_cluster(
    jobs: Sequence[dict[str, Any]], *, module: str, address: str, timeout: float
) -> Generator[tuple[int, dict[str, Any] | JobLost], None, None]:
    """Yield (place in `jobs`, answer) as they come, as `workers.run_jobs` does.

    Paths in the jobs must mean the same on every machine: meshes and OUT lie on a file system that they share. Each thread of a
    Dask worker runs the jobs in a process of its own, so that a crash or a hang costs one job and not the worker.

    Raises ConfigError without Dask or a scheduler at `address`, DataError if no machine is left or the scheduler goes.
    """
    try:
        from distributed import Client, as_completed
    except ImportError as error:
        raise ConfigError("--cluster needs Dask: pip install 'shapediff[cluster]'") from error
    try:
        client = Client(address, timeout=_CONNECT_SECONDS, set_as_default=False)
    except (OSError, ValueError, TimeoutError) as error:
        raise ConfigError(
            f"no Dask scheduler answers at {address}: {error}; start one with `dask scheduler`"
        ) from error
    with client:
        if not client.scheduler_info()["workers"]:
            raise DataError(f"the scheduler at {address} has no workers; start some with `dask worker {address}`")
        futures = [client.submit(do_isolated, job, module, timeout, pure=False, retries=2) for job in jobs]
        place_of = {future.key: place for place, future in enumerate(futures)}
        try:
            with _given_up_when_deserted(client, futures):
                for future in as_completed(futures, loop=client.loop, raise_errors=False):
                    yield place_of[future.key], _answer(future)
                    future.release()
        except CancelledError as error:
            raise DataError(
                f"the scheduler at {address} has no workers any more, or went itself; start them again and run the same "
                "command: finished meshes are not done again"
            ) from error
        finally:
            client.cancel(futures)


def do_isolated(job: dict[str, Any], module: str, timeout: float) -> dict[str, Any] | JobLost:
    """One job in this thread's own process, on a machine of the cluster; {"fatal": why} if that machine can start none."""
    worker = getattr(_here, module, None)
    if worker is None or worker.timeout != timeout:
        worker = Worker(module, timeout=timeout)
        setattr(_here, module, worker)
    try:
        return worker.ask(job)
    except ShapediffError as error:
        return {"fatal": f"{platform.node()}: {error}"}


@contextmanager
def _given_up_when_deserted(client: Any, futures: list[Any]) -> Iterator[None]:
    """Cancel the futures once there was no worker for a while: nothing else would wake who waits for them."""
    over = threading.Event()

    def watch() -> None:
        last_seen = time.monotonic()
        while not over.wait(_LOOK_SECONDS):
            if client.scheduler_info()["workers"]:
                last_seen = time.monotonic()
            elif time.monotonic() - last_seen > _PATIENCE_SECONDS:
                client.cancel(futures)
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        over.set()
        watcher.join()


def _answer(future: Any) -> dict[str, Any] | JobLost:
    """Raises CancelledError for a job that was given up, which says nothing of its mesh."""
    if future.status in ("finished", "cancelled"):
        return future.result()
    error = future.exception()
    return JobLost(f"the cluster lost it: {type(error).__name__}: {str(error)[:200]}")
