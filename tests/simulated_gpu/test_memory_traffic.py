"""The bytes of global memory that the launches of each op move, against the minimum that the op needs.

The executor counts a byte once per access of a program (tools/ptx_executor/memory.py), so scalars and chunk tables
count as well; the overheads below leave room for them. What torch itself moves, such as zeros for counts, is not seen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import PTX_ARCHITECTURE, PTX_BACKEND, BackendUnderTest
from tests.support import oracle

pytestmark = pytest.mark.skipif(not PTX_ARCHITECTURE, reason="the PTX executor counts the bytes")

ops = torch.ops.feather_kernels
NUMEL = 1 << 17
OVERHEAD = 0.0035  # at most measured: 0.32 %, the table's row of a chunk of 8,192 bfloat16 weights
CUDA_OVERHEAD = 0.02
T, HALF = torch.tensor(1.2), torch.tensor(0.5)


def normal(dtype: torch.dtype = torch.float32, numel: int = NUMEL, seed: int = 0) -> Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(seed)).to(dtype)


def gradient_of_float32() -> None:
    ops.scale_pruned_grad(normal(), normal(), T, HALF)


def gradient_from_bfloat16() -> None:
    ops.scale_pruned_grad(normal(torch.bfloat16), normal(), T, HALF, out_dtype=torch.float32)


def forward(dtype: torch.dtype, out_dtype: torch.dtype, p: float) -> Callable[[], None]:
    return lambda: ops.threshold(normal(dtype), T, p, out_dtype=out_dtype)


BYTES_PER_WEIGHT: dict[str, tuple[Callable[[], Any], int]] = {
    **{f"forward p={p}": (forward(torch.float32, torch.float32, p), 8) for p in (1.0, 2.0, 3.0, math.inf)},
    "forward float32 to bfloat16": (forward(torch.float32, torch.bfloat16, 3.0), 6),
    "forward bfloat16": (forward(torch.bfloat16, torch.bfloat16, 3.0), 4),
    "gradient in place": (gradient_of_float32, 12),
    "gradient bfloat16 to float32": (gradient_from_bfloat16, 10),
    "count": (lambda: ops.count_pruned([normal()], [T]), 4),
    "count bfloat16": (lambda: ops.count_pruned([normal(torch.bfloat16)], [T]), 2),
}


def expect_bytes(executor: Any, minimum: int, overhead: float = OVERHEAD) -> None:
    overhead = max(overhead, CUDA_OVERHEAD) if PTX_BACKEND == "cuda" else overhead
    moved = sum(report.bytes_read + report.bytes_written for report in executor.launches)
    assert minimum <= moved <= minimum * (1 + overhead), f"{moved:,} bytes, {moved / minimum - 1:.2%} above the minimum"


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


STEADY_NUMEL = 1 << 20  # so that what a group costs, some 8 KB, is little beside its weights
QUARTERS = [STEADY_NUMEL // 4 + 1000, STEADY_NUMEL // 4 - 1000, STEADY_NUMEL // 4, STEADY_NUMEL // 4]
STEADY: dict[str, dict[str, Any]] = {
    "one group": {},
    "several groups": {"groups": [1, 0, 1, 0]},
    "scaled": {"groups": [0, 0, 1, 1], "scales": [0.5, 3.0, 1.0, 0.1]},
    "ties": {"store": lambda w: w.mul(64).round() / 64},
    "bfloat16": {"store": Tensor.bfloat16},
    "bfloat16, scaled": {"groups": [0, 1, 0, 1], "scales": [0.5, 3.0, 1.0, 0.1], "store": Tensor.bfloat16},
}


@pytest.mark.parametrize("name", STEADY)
def test_steady_selection_reads_the_weights_once(backend: BackendUnderTest, executor: Any, name: str) -> None:
    """Given the result of the step before it counts the keys of a bracket around that, and sums 8 bytes for each."""
    from feather_kernels.backends.triton import bracket

    case = STEADY[name]
    groups, scales, store = case.get("groups", [0] * 4), case.get("scales", [1.0] * 4), case.get("store", Tensor.float)
    latent, drift = normal(numel=STEADY_NUMEL), 1 + 1e-5 * normal(numel=STEADY_NUMEL, seed=1)
    before, after = (store(w).split(QUARTERS) for w in (latent, latent * drift))
    ranks = [int(0.95 * STEADY_NUMEL / (max(groups) + 1))] * (max(groups) + 1)

    def order_statistics(weights: Sequence[Tensor]) -> Tensor:
        parts = [oracle.scores(w, scale) for w, scale in zip(weights, scales, strict=True)]
        members = [[part for part, own in zip(parts, groups, strict=True) if own == group] for group in set(groups)]
        return torch.stack([oracle.order_statistics(own, rank) for own, rank in zip(members, ranks, strict=True)])

    result = ops.magnitude_select(
        after,
        groups,
        torch.tensor(ranks),
        scales=torch.tensor(scales) if "scales" in case else None,
        hint=order_statistics(before),
    )
    assert not torch.cat(before).equal(torch.cat(after))
    assert oracle.same_bits(result, order_statistics(after))
    weight_bytes = after[0].element_size() * STEADY_NUMEL
    counts_bytes = 8 * bracket.bracket_keys(torch.float32, len(ranks), STEADY_NUMEL) * len(ranks)
    overhead = 0.02 if after[0].dtype == torch.float32 else 0.03  # the same tables beside half the bytes
    expect_bytes(executor, weight_bytes + counts_bytes, overhead)
    passes = [report.bytes_read for report in executor.launches if report.kernel == "histogram_kernel"]
    assert passes, "the passes for a bracket that misses are launched"
    assert sum(passes) < 0.04 * STEADY_NUMEL, "and exit at once: 1 % of what float32 weights take"
