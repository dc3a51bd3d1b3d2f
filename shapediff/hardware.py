"""What the machine offers, and what others do."""

from __future__ import annotations

import ctypes
import os
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

GIB = 2**30
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4  # malloc.h
_MADV_HUGEPAGE = 14  # sys/mman.h
_HUGE_PAGE, _FIRST_BYTES = 2 << 20, 2 << 30


@dataclass(frozen=True)
class Accelerator:
    """A processor to train on: bytes of memory, and peak TFLOP/s of dense matrix products (None: not known)."""

    name: str
    memory: int
    bf16_tflops: float | None
    float32_tflops: float | None

    @property
    def is_gpu(self) -> bool:
        """Whether it is a GPU."""
        return self.name != "cpu"


ACCELERATORS = {
    name: Accelerator(name, memory * GIB, bf16_tflops, float32_tflops)
    for name, memory, bf16_tflops, float32_tflops in (
        # Data sheets: bf16 summed in float32, without sparsity; float32 without TF32.
        ("rtx3090", 24, 71, 35.6),
        ("rtx4090", 24, 165, 82.6),
        ("rtx5090", 32, 210, 105),
        ("l40s", 48, 362, 91.6),
        ("a100-40gb", 40, 312, 19.5),
        ("a100", 80, 312, 19.5),
        ("h100", 80, 989, 67),
        ("h200", 141, 989, 67),
        # Two cores with bf16 matrix units: what training a UNet3D reaches there (0.48 and 0.18 TFLOP/s) is 0.3 of these.
        ("cpu", 16, 1.6, 0.6),
    )
}


def default_device() -> torch.device:
    """The first GPU if torch sees one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_bf16(device: torch.device) -> bool:
    """Whether bfloat16 is faster than float32 on `device`: GPUs since Ampere, CPUs with AMX or AVX-512 BF16 units."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu" and _cpu_has_bf16()


@lru_cache
def _cpu_has_bf16() -> bool:
    try:
        flags = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return False
    return "amx_bf16" in flags or "avx512_bf16" in flags


def keep_freed_memory() -> None:
    """Let this process use freed memory again, where glibc would give it back to the system, which clears it for the next step.

    For commands that train or sample on a CPU, whose steps need the same memory again; in huge pages, where Linux has them.
    What MALLOC_ variables say of it stands.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    with suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL("libc.so.6")
        for option, value in ((_M_TRIM_THRESHOLD, -1), (_M_TOP_PAD, 64 << 20), (_M_MMAP_MAX, 0)):
            libc.mallopt(option, value)
        _ask_for_huge_pages(libc)


def _ask_for_huge_pages(libc: ctypes.CDLL) -> None:
    """For what malloc will hand out next: it takes the addresses from the system now, and the memory when it is used."""
    libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
    libc.free.argtypes = [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    start = libc.malloc(_FIRST_BYTES)
    if start:
        first = -(-start // _HUGE_PAGE) * _HUGE_PAGE
        libc.madvise(first, _FIRST_BYTES - _HUGE_PAGE, _MADV_HUGEPAGE)
        libc.free(start)


def accelerator_of(device: torch.device) -> Accelerator:
    """What `device` is, with the memory that it really has."""
    if device.type == "cpu":
        return replace(ACCELERATORS["cpu"], memory=os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    name = torch.cuda.get_device_name(device)
    known = next((a for key, a in ACCELERATORS.items() if key in name.lower().replace(" ", "")), None)
    memory = torch.cuda.get_device_properties(device).total_memory
    return replace(known or Accelerator(name, memory, None, None), name=name, memory=memory)


def memory_in_use(device: torch.device) -> int:
    """Bytes that this process takes: the most that tensors took so far of a GPU, or what lies in the machine's memory now."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the most so far
        import resource

        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return most if sys.platform == "darwin" else most * 1024
