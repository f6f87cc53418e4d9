"""Where a measurement was made: everything that a figure depends on beyond the code."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path

import torch

import feather_kernels as fk
from benchmarks import backends
from feather_kernels.backends.registry import registry
from feather_kernels.cli.doctor import version
from feather_kernels.cli.gpu_report.machine import commit

INSTRUCTION_SETS = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_bf16", "avx512_fp16"),
    *("asimd", "asimdhp", "bf16", "sve"),
)


def describe(device: torch.device) -> dict[str, str]:
    """Date, package, machine and versions, by the names of the csv's columns."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "package": fk.__version__,
        "commit": commit(),
        "backend": registry.chosen_name(device),
        "device": device.type,
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()[0],
        "cpu": _cpu()[0],
        "instruction_sets": _cpu()[1],
        "kernels": _kernels(device),
        "threads": str(torch.get_num_threads()),
        "torch": torch.__version__,
        "triton": version("triton", missing=""),
        "python": platform.python_version(),
    }


def _cpu() -> tuple[str, str]:
    """Model name, and those of ``INSTRUCTION_SETS`` that it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine(), ""
    facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = set((facts.get("flags") or facts.get("Features") or "").split())
    model = facts.get("model name") or platform.machine()
    return model, " ".join(name for name in INSTRUCTION_SETS if name in flags)


def _kernels(device: torch.device) -> str:
    """The instruction set that the C++ backend's kernels use, or nothing where it does not run."""
    module = backends.cpp_module() if device.type == "cpu" else None
    return "" if module is None else str(module.instruction_set())
