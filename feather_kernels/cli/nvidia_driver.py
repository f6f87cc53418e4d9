"""The version of the NVIDIA driver, asked from its own library without touching a GPU, and why torch sees no GPU."""

from __future__ import annotations

import ctypes
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import torch

LIBRARY = "nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1"
RELEASE = Path("/proc/driver/nvidia/version")


class Driver(NamedTuple):
    """A driver: the newest CUDA version that it supports, as (major, minor), and its release ("" if unknown)."""

    cuda: tuple[int, int]
    release: str

    def __str__(self) -> str:
        version = f"CUDA {self.cuda[0]}.{self.cuda[1]}"
        return f"{self.release}, for {version}" if self.release else f"for {version}"


def no_device() -> str:
    """Why torch finds no CUDA device, where ``torch.cuda.device_count()`` is 0."""
    if torch.version.cuda is None and torch.version.hip is None:
        reason = "torch is built for CPUs only"
    elif torch.version.hip is None and installed() is None:
        reason = "no NVIDIA driver"
    else:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        reason = "torch sees no GPU" + ("" if visible is None else f"; CUDA_VISIBLE_DEVICES is {visible!r}")
    return f"no CUDA device found ({reason})"


def installed() -> Driver | None:
    """The driver, or None if there is none."""
    version = ctypes.c_int()
    try:
        if ctypes.CDLL(LIBRARY).cuDriverGetVersion(ctypes.byref(version)) != 0:
            return None
    except (OSError, AttributeError):
        return None
    return Driver((version.value // 1000, version.value % 1000 // 10), _release())


def _release() -> str:
    try:
        found = re.search(r"\b\d{3,}\.\d+(\.\d+)?\b", RELEASE.read_text())
    except OSError:
        return ""
    return found[0] if found else ""
