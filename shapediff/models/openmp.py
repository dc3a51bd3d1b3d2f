"""Compiled loops on the OpenMP threads of PyTorch: those of another pool would compete with them, which spin while they wait."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int64


@lru_cache
def parallel() -> Any | None:
    """The function of the OpenMP library that PyTorch uses which runs work(job) on its threads; None where there is no such
    library, or no numba to compile work.
    """
    if find_spec("numba") is None:
        return None
    try:
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))  # loaded already
        call = library.GOMP_parallel
    except (OSError, AttributeError):
        return None
    call.argtypes, call.restype = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint], None
    return call


def run(work: Any, job: Int64[np.ndarray, " n"], num_threads: int) -> None:
    """Call numba's `work`, a cfunc of a pointer to int64, on each of `num_threads` threads, the caller's among them."""
    call = parallel()
    if num_threads == 1 or call is None:
        work.ctypes(job.ctypes.data_as(ctypes.POINTER(ctypes.c_int64)))
    else:
        call(work.address, job.ctypes.data, num_threads, 0)
