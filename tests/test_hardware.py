"""What a process does with memory that it no longer needs."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

STEPS = """
import resource
import torch
from shapediff.hardware import keep_freed_memory

if {keeps}:
    keep_freed_memory()

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(24 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(min(faults() for _ in range(20)))
"""


def faults(*, keeps: bool, **environment: str) -> int:
    """Pages that a step finds gone which takes 96 MiB, again and again."""
    given = {**{k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}, **environment}
    command = [sys.executable, "-c", STEPS.format(keeps=keeps)]
    return int(subprocess.run(command, capture_output=True, check=True, env=given).stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's allocator")
def test_freed_memory_is_kept_where_asked() -> None:
    """24,576 pages of 4 KiB, or 48 of 2 MiB, come anew each time otherwise; and where the environment says so."""
    assert faults(keeps=True) == 0
    assert faults(keeps=False) >= 48
    assert faults(keeps=True, MALLOC_MMAP_THRESHOLD_="65536") >= 48
