"""What the machine offers."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import torch


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
