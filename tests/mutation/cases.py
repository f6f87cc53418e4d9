"""What a check of mutated kernels is: it runs ops on small inputs and raises if values or counted bytes are wrong.

The inputs are of the kinds that the op tests use: boundary values, layouts, ties, NaN, caps, hints, every special rank.
They are packed into few launches, because each check runs once for every mutant of the kernels that it launches.
elementwise.py, lists.py and selection.py hold the checks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from tests.simulated_gpu.executed_cuda import plain_name
from tests.support import samples
from tools.ptx_executor.execution import LaunchReport

FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = samples.DTYPES
NAN, INF = math.nan, math.inf
CPU = torch.device("cpu")
# ends at each of a thread's places, of which 8, 4, 2 or 1 follow each other, and a block that lacks one element
TAILS = (*range(1, 9), *range(128, 1024, 128), 257, 258, *range(514, 522), 769, 770, 1023)
ROOM = 96  # bytes a program may move beside its elements: scalars, its row of a table, constants


class Case(NamedTuple):
    """``check`` runs ops and raises if they are wrong; it is given the reports of all launches since it began."""

    name: str
    check: Callable[[list[LaunchReport]], None]
    backends: tuple[str, ...] = ("triton", "cuda")


def most_bytes(launches: Sequence[LaunchReport], payload: float) -> None:
    """Raises where the launches moved more than their payload and what their programs need."""
    moved = sum(report.bytes_read + report.bytes_written for report in launches)
    programs = sum(math.prod(report.grid) for report in launches)
    assert moved <= payload + ROOM * programs, f"{moved} bytes where {payload} must move"


def whole_blocks_are_wide(launches: Sequence[LaunchReport], kernel: str, scalars: int) -> None:
    """Raises where ``kernel``, on whole blocks, moves more than a thread's scalars by less than 16 bytes at once."""
    own = [report for report in launches if plain_name(report.kernel) == kernel]
    assert own, f"launched were {sorted(plain_name(report.kernel) for report in launches)}"
    for report in own:
        found, most = report.narrow_accesses, scalars * report.threads
        assert found <= most, f"{found} accesses of less than 16 bytes where threads have {most} scalars"


def one_atomic_a_warp(launches: Sequence[LaunchReport], kernel: str) -> None:
    """Raises where ``kernel`` updates global memory more often: atomics on one address wait for each other."""
    for report in launches:
        if plain_name(report.kernel) == kernel:
            found, most = report.global_atomics, report.threads // 32
            assert found <= most, f"{found} atomic updates by {most} warps"
