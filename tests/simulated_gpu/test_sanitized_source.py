"""The CUDA sources as C++ on the CPU, under sanitizers, which find planted bugs (docs/design/cuda.md)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.simulated_gpu import sanitized_source
from tests.simulated_gpu.sanitized_source import MEMORY, RACES, SHIPPED, Change

TESTS = Path(__file__).parents[1]
EVERY_KERNEL_ONCE = ("elementwise_once", "select_once", "histogram", "count")  # a CUDA thread is one of the system's


def run(program: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([program, *tests], capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize(
    ("build", "tests"),
    [(MEMORY, ()), (SHIPPED, ()), (RACES, EVERY_KERNEL_ONCE)],
    ids=lambda value: value.name if isinstance(value, sanitized_source.Build) else "",
)
def test_csrc_tests_pass(build: sanitized_source.Build, tests: tuple[str, ...]) -> None:
    done = run(sanitized_source.test_program(build), *tests)
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    assert done.stdout.count("passed in") == (len(tests) or 7)


def test_op_tests_pass_on_the_python_backend() -> None:
    """From the dispatcher through the Python launcher and the C++ launches to the kernels."""
    environment = {**os.environ, "FEATHER_CUDA_MODULE": str(sanitized_source.module())}
    modes = "training/test_ambient_modes.py::test_ops_inside_of_a_mode_give_what_they_give_outside"
    files = [str(TESTS / name) for name in ("ops/test_threshold.py", "ops/test_select.py", modes)]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "not slow", "-k", "not any_values", *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "passed" in done.stdout


PLANTED = {
    "no barrier between zeroing and counting": (
        Change("cuda/radix_select.cuh", "    __syncthreads();\n    const K upper", "    const K upper"),
        RACES,
        "histogram",
        "data race",
    ),
    "no barrier between counting and adding up": (
        Change("cuda/radix_select.cuh", "    __syncthreads();\n    int64_t* row = counts", "    int64_t* row = counts"),
        MEMORY,
        "histogram",
        "histogram of",
    ),
    "no barrier before the sums of warps are read": (
        Change("cuda/block_reduce.cuh", "  __syncthreads();\n  int64_t total", "  int64_t total"),
        MEMORY,
        "select",
        "select ",
    ),
    "barrier in a branch": (
        Change("cuda/block_reduce.cuh", "= through;\n  __syncthreads();", "= through, __syncthreads();"),
        MEMORY,
        "select",
        "CUDA fault",
    ),
    "tail one too long": (
        Change("cuda/elementwise.cuh", "head + n - tail, threads", "head + n - tail + 1, threads"),
        MEMORY,
        "scale",
        "heap-buffer-overflow",
    ),
    "tail of a chunk one too long": (
        Change("cuda/chunk_table.cuh", "if (tail + thread < chunk.elements)", "if (tail + thread <= chunk.elements)"),
        MEMORY,
        "count",
        "heap-buffer-overflow",
    ),
    "tail forgotten": (
        Change("cuda/elementwise.cuh", "head + n - tail, threads", "head, threads"),
        MEMORY,
        "scale",
        "scale ",
    ),
    "wide access to a misaligned address": (
        Change("cuda/elementwise.cu", "for (int64_t head = 0;", "if (n > 0) return 0;\n  for (int64_t head = 0;"),
        MEMORY,
        "scale",
        "misaligned address",
    ),
    "head of a chunk forgotten": (
        Change("cuda/chunk_table.cuh", "(kAccess - past) % kAccess / sizeof(W)", "past * 0 / sizeof(W)"),
        MEMORY,
        "count",
        "misaligned address",
    ),
    "bin one beyond the shared memory": (
        Change("cuda/radix_select.cuh", "found, 1 << kDigitBits);", "found, (1 << kDigitBits) - 1);"),
        MEMORY,
        "histogram",
        "out of bounds",
    ),
}


PER_COMMIT = ("no barrier between counting and adding up", "tail one too long", "wide access to a misaligned address")


@pytest.mark.parametrize(
    "name", [name if name in PER_COMMIT else pytest.param(name, marks=pytest.mark.slow) for name in PLANTED]
)
def test_planted_bug_is_found(name: str, tmp_path: Path) -> None:
    change, build, test, words = PLANTED[name]
    done = run(sanitized_source.changed_program(build, change, tmp_path), test)
    assert done.returncode != 0, "the bug passed"
    assert words in done.stderr, done.stderr[-4000:]
