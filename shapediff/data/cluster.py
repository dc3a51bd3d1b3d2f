"""The jobs of `workers.run_jobs` on the machines of a Dask cluster.

Dask and not Ray: its scheduler and workers are plain Python programs that come with every batch system's recipes (dask-jobqueue,
Slurm, Kubernetes), need no daemon or object store, and a job that was on a machine that died is given to another.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence
from typing import Any

from shapediff.data.workers import JobLost, Worker
from shapediff.errors import ConfigError, DataError

_CONNECT_SECONDS = 30
_here = threading.local()


def run_jobs_on_cluster(
    jobs: Sequence[dict[str, Any]], *, module: str, address: str, timeout: float
) -> Generator[tuple[int, dict[str, Any] | JobLost], None, None]:
    """Yield (place in `jobs`, answer) as they come, as `workers.run_jobs` does.

    Paths in the jobs must mean the same on every machine: meshes and OUT lie on a file system that they share. Each thread of a
    Dask worker runs the jobs in a process of its own, so that a crash or a hang costs one job and not the worker.

    Raises ConfigError without Dask or a scheduler at `address`, DataError if no machine is left.
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
            for future in as_completed(futures, loop=client.loop, raise_errors=False):
                yield place_of[future.key], _answer(future)
                future.release()
        finally:
            client.cancel(futures)


def do_isolated(job: dict[str, Any], module: str, timeout: float) -> dict[str, Any] | JobLost:
    """One job in this thread's own process, on a machine of the cluster."""
    worker = getattr(_here, module, None)
    if worker is None or worker.timeout != timeout:
        worker = Worker(module, timeout=timeout)
        setattr(_here, module, worker)
    return worker.ask(job)


def _answer(future: Any) -> dict[str, Any] | JobLost:
    if future.status == "finished":
        return future.result()
    error = future.exception()
    return JobLost(f"the cluster lost it: {type(error).__name__}: {str(error)[:200]}")
