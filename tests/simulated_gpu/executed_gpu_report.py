"""``feather-kernels gpu-report`` with an executor of PTX in the place of the GPU: counts instead of times.

    python -m tests.simulated_gpu.executed_gpu_report FOLDER [PART ...]

writes gpu-report-ptx-sm_90.json and .md there, over those of before. It executes the PTX of
Triton's kernels, and where ``nvcc`` is on PATH that of the CUDA C++ backend. With the arguments of a part's process it
is that process.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from feather_kernels.backends.registry import registry
from feather_kernels.cli.gpu_report import machine, page, part, report
from feather_kernels.cli.gpu_report.parts import PARTS
from feather_kernels.cli.gpu_report.place import Place
from tests.conftest import CPU, ptx_executor

ARCHITECTURE = 90
NAME = f"ptx-sm_{ARCHITECTURE}"
CHILD = (sys.executable, "-m", "tests.simulated_gpu.executed_gpu_report")
SLOW = 6.0  # the executor, on a busy machine


def facts() -> dict[str, str]:
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


def place(launches: list[Any]) -> Place:
    meter = counting(launches)
    return Place(
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

        from tests.simulated_gpu.cuda_ptx import executed

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
    if "--device" not in arguments:
        return make(Path(arguments[0]), tuple(arguments[1:]) or tuple(PARTS))
    with executor(arguments[0]) as launches, registry.use_backend(registry.AUTO):
        return part.main(arguments, lambda device, quick: place(launches))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
