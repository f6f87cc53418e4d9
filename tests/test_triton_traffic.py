"""Rings 3 and 4: bytes of global memory that the launches of each op read and write, against the contract's minimum.

The executor counts a byte once per access of a program (ptx/memory.py), so scalars and tables of chunks count as well:
``OVERHEAD`` is room for them. What torch itself moves, such as zeros for counts, is not seen.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import samples
import torch
from conftest import PTX_ARCHITECTURE, BackendUnderTest
from torch import Tensor

pytestmark = pytest.mark.skipif(not PTX_ARCHITECTURE, reason="bytes are counted in rings 3 and 4")

ops = torch.ops.feather_kernels
NUMEL = 1 << 17
OVERHEAD = 0.02
BRACKET_BYTES = 8 << 17  # counts of 2^17 keys, whatever the number of weights, which CUDA C++ sums in a launch
T, HALF = torch.tensor(1.2), torch.tensor(0.5)


def normal(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(NUMEL, generator=torch.Generator().manual_seed(0)).to(dtype)


def gradient_in_place() -> None:
    ops.scale_pruned_grad_(normal(), normal(), T, HALF)


def gradient_from_bfloat16() -> None:
    ops.scale_pruned_grad(normal(torch.bfloat16), normal(), T, HALF, out_dtype=torch.float32)


def forward(dtype: torch.dtype, out_dtype: torch.dtype, p: float) -> Callable[[], None]:
    return lambda: ops.threshold(normal(dtype), T, p, out_dtype=out_dtype)


BYTES_PER_WEIGHT: dict[str, tuple[Callable[[], Any], int]] = {
    **{f"forward p={p}": (forward(torch.float32, torch.float32, p), 8) for p in samples.POWERS},
    "forward float32 to bfloat16": (forward(torch.float32, torch.bfloat16, 3.0), 6),
    "forward bfloat16": (forward(torch.bfloat16, torch.bfloat16, 3.0), 4),
    "gradient in place": (gradient_in_place, 12),
    "gradient bfloat16 to float32": (gradient_from_bfloat16, 10),
    "count": (lambda: ops.count_pruned([normal()], [T]), 4),
    "count bfloat16": (lambda: ops.count_pruned([normal(torch.bfloat16)], [T]), 2),
}


def expect_bytes(executor: Any, minimum: int, overhead: float = OVERHEAD) -> None:
    moved = sum(report.bytes_read + report.bytes_written for report in executor.launches)
    assert minimum <= moved <= minimum * (1 + overhead), f"{moved / NUMEL:.3f} bytes a weight"


@pytest.mark.parametrize("name", BYTES_PER_WEIGHT)
def test_every_byte_once(backend: BackendUnderTest, executor: Any, name: str) -> None:
    call, bytes_per_weight = BYTES_PER_WEIGHT[name]
    call()
    expect_bytes(executor, bytes_per_weight * NUMEL)


def test_an_accumulated_list_is_read_once(backend: BackendUnderTest, executor: Any) -> None:
    """Many small tensors in one launch: chunks that are not full cost nothing but their rows in the table."""
    sizes = [NUMEL // 2, NUMEL // 4, NUMEL // 8, *[NUMEL // 64] * 8]
    ops.count_pruned(list(normal().split(sizes)), [T] * len(sizes))
    assert len(executor.launches) == 1
    expect_bytes(executor, 4 * NUMEL)


def test_steady_selection_reads_the_weights_once(backend: BackendUnderTest, executor: Any) -> None:
    """Given the result of the step before; beside the weights it counts the keys of a bracket around that."""
    weights, rank = [normal()], torch.tensor([int(0.95 * NUMEL)])
    hint = ops.magnitude_select(weights, [0], rank)
    weights[0] *= 1 + 1e-5 * torch.randn(NUMEL, generator=torch.Generator().manual_seed(1))
    expected = ops.magnitude_select(weights, [0], rank)
    assert not expected.equal(hint)
    executor.launches.clear()
    assert ops.magnitude_select(weights, [0], rank, hint=hint).equal(expected)
    bracket = BRACKET_BYTES if backend.name == "cuda" else 0
    expect_bytes(executor, 4 * NUMEL + bracket, overhead=0.05)
    passes = [report.bytes_read for report in executor.launches if report.kernel == "histogram_kernel"]
    assert passes, "the passes for a bracket that misses are launched"
    assert sum(passes) < 0.01 * 4 * NUMEL, "and exit at once"
