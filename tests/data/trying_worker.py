"""A worker for test_workers.py that answers, prints, dies or hangs, as its job says."""

from __future__ import annotations

import os
import time
from typing import Any

from shapediff.data.workers import serve


def main() -> None:
    if os.environ.get("TRYING_WORKER_FAILS"):
        raise OSError("this library is missing")
    serve(_handle)


def _handle(job: dict[str, Any]) -> dict[str, Any]:
    if job["do"] == "die":
        os._exit(7)
    if job["do"] == "abort":
        os.abort()
    if job["do"] == "hang":
        time.sleep(60)
    print("noise that is no answer")
    os.system("echo more noise")
    return {"square": job["number"] ** 2, "threads": os.environ["OMP_NUM_THREADS"]}
