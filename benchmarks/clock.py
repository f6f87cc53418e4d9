"""Time and memory of one run of a variant, on a CPU or a CUDA device."""

from __future__ import annotations

import ctypes
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch

from feather_kernels.cli.gpu_report.clock import CudaClock, Run

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h


class Clock(Protocol):
    """Times functions on a device."""

    def time(self, run: Callable[[], Any]) -> Run:
        """Run it once and time it."""

    def peak_memory(self, run: Callable[[], Any]) -> tuple[Run, int | None]:
        """Run it once; also the bytes that it held at most beyond those held before, None where unknown."""


def clock_for(device: torch.device) -> Clock:
    """The clock of a device; raises ValueError for one that has none."""
    if device.type == "cpu":
        return CpuClock()
    if device.type == "cuda":
        return CudaClock(device)
    raise ValueError(f"device must be cpu or cuda, got {device}")


class CpuClock:
    """Wall time; memory as the resident set's growth, so that allocations of any library count (Linux only).

    A process that makes one keeps its freed memory from then on.
    """

    def __init__(self) -> None:
        keep_freed_memory()

    def time(self, run: Callable[[], Any]) -> Run:
        """Wall time of one run."""
        start = time.perf_counter()
        result = run()
        return Run(result, time.perf_counter() - start)

    def peak_memory(self, run: Callable[[], Any]) -> tuple[Run, int | None]:
        """Growth of the resident set: free memory is given back first, the kernel keeps the maximum."""
        if not _reset_peak():
            return self.time(run), None
        before = _status("VmRSS")
        done = self.time(run)
        return done, max(_status("VmHWM") - before, 0)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory instead of returning it to the system, as jemalloc and tcmalloc do.

    By default it unmaps large allocations and returns the top of a large heap. A result of 100 MB then costs 25,000
    page faults, more than the work that fills it; how many a training step pays (up to 5 % of it) is luck.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def _reset_peak() -> bool:
    """Give free memory back to the system and set its record of the largest resident set to the present size."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):  # not glibc, not Linux, or a sandbox
        return False
    return True


def _status(field: str) -> int:
    """Bytes in a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
