"""Runs ``feather-kernels gpu-report`` with the PTX executor in place of a GPU: counts instead of times.

    python -m tools.gpu_report_on_executor FOLDER [PART ...]

replaces gpu-report-ptx-sm_90.json and .md in FOLDER. It executes the PTX of Triton's kernels, and that of the CUDA C++
backend if ``nvcc`` is on PATH. The report starts this module once for each part, with that part's arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from feather_kernels.backends.registry import registry
from feather_kernels.cli.gpu_report import machine, page, report, run_part
from feather_kernels.cli.gpu_report.parts import PARTS
from feather_kernels.cli.gpu_report.target import Target
from tests.conftest import CPU, ptx_executor

ARCHITECTURE = 90
NAME = f"ptx-sm_{ARCHITECTURE}"
CHILD = (sys.executable, "-m", "tools.gpu_report_on_executor")
SLOW = 6.0  # the executor, on a busy machine


def facts() -> dict[str, str]:
    """The head of the report: there is no GPU, and the versions of what compiled the kernels."""
    major, minor = divmod(ARCHITECTURE, 10)
    own = {"gpu": "none: an executor of PTX", "compute capability": f"{major}.{minor}"}
    return {**own, "memory": "none", "driver": "none", **machine.versions()}


def counting(launches: list[Any]) -> Callable[[Callable[[], object]], dict[str, float]]:
    """A meter: what the executor counts while something runs; copies of torch's are no launches."""

    def measure(run: Callable[[], object]) -> dict[str, float]:
        before = len(launches)
        run()
        done = launches[before:]
        return {
            page.LAUNCHES: len(done),
            page.INSTRUCTIONS: sum(sum(launch.instructions.values()) for launch in done),
            page.READ: sum(launch.bytes_read for launch in done),
            page.WRITTEN: sum(launch.bytes_written for launch in done),
        }

    return measure


def executor_target(launches: list[Any]) -> Target:
    """Where the parts run: on CPU tensors, at sizes that the executor can manage."""
    meter = counting(launches)
    return Target(
        CPU,
        facts,
        lambda: meter,
        lambda: meter,
        backend="triton",
        elements=1 << 14,
        rounds=1,
        layers=2,
        large=False,
        compiler="eager",  # what inductor makes would run on the CPU
    )


@contextmanager
def executor(name: str) -> Iterator[list[Any]]:
    """The launches of the executor that a part needs."""
    if name.endswith("-cuda"):
        import shutil

        from tests.simulated_gpu.executed_cuda import executed

        chosen: Any = executed(ARCHITECTURE) if shutil.which("nvcc") else nullcontext()
    else:
        chosen = ptx_executor(ARCHITECTURE)
    with chosen as driver:
        yield [] if driver is None else driver.launches


def make(folder: Path, parts: tuple[str, ...] = tuple(PARTS)) -> int:
    """The report, in two files of a folder."""
    torch.set_num_threads(1)
    return report.make(report.Request(folder, NAME, True, child=CHILD, kind=page.COMPUTED, patience=SLOW, parts=parts))


def main(arguments: list[str]) -> int:
    """Make the report, or one part of it in a process of its own."""
    if "--device" not in arguments:
        return make(Path(arguments[0]), tuple(arguments[1:]) or tuple(PARTS))
    with executor(arguments[0]) as launches, registry.use_backend(registry.AUTO):
        return run_part.main(arguments, lambda device, quick: executor_target(launches))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
