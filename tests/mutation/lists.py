"""Checks of counts and histograms over lists of tensors (see cases.py); a mutant of their kernels should fail one."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, partial

import torch
from torch import Tensor

from tests.mutation.cases import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, INF, NAN, TAILS, Case, most_bytes
from tests.support import oracle, samples
from tools.ptx_executor.execution import LaunchReport

ops = torch.ops.feather_kernels


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


ROUNDS = (2600, 3600, 4700, 7000)  # with the others every number of rounds of a CUDA block, modulo 4, in every dtype


@cache
def weight_list(*dtypes: torch.dtype, coarse: bool = False, dense: bool = False) -> list[Tensor]:
    """More than a chunk, two misaligned ones, one smaller than an access, an empty one, special values and ties.

    coarse: few distinct values. dense: most keys are among a thousand from 1 on, as close as in a large net.
    """
    g = seeded(3)
    special = torch.tensor([0.0, -0.0, INF, -INF, NAN, -NAN, 1e-40, 0.5, -0.5, 0.5])
    made = [torch.randn(n, generator=g) for n in (9001, 1031, 0, 3)]
    flat = [*made, special, torch.randint(-4, 5, (700,), generator=g) / 4]
    flat = [w.mul(8).round() / 8 for w in flat] if coarse else flat
    flat += [torch.randn(n, generator=g) for n in ROUNDS]
    for end in (0.0, 5.0):  # pruned and kept; an odd number of arrays, so that of two dtypes each ends everywhere
        flat += [torch.cat([torch.randn(n - 1, generator=g), torch.tensor([end])]) for n in (*TAILS, 2)]
    if dense:
        spacing = torch.finfo(dtypes[0]).eps
        near = [1 + torch.randint(0, 1000, w.shape, generator=g).double() * spacing for w in flat]
        flat = [w.where(torch.rand(w.shape, generator=g) < 0.3, at) for w, at in zip(flat, near, strict=True)]
    cast = [w.to(dtypes[i % len(dtypes)]) for i, w in enumerate(flat)]
    return [samples.LAYOUTS["misaligned"](w) if i in (1, 6) else w for i, w in enumerate(cast)]


def payload_of(listed: Sequence[Tensor]) -> int:
    return sum(w.numel() * w.element_size() for w in listed)


def count(launches: list[LaunchReport], listed: Sequence[Tensor], thresholds: Sequence[float]) -> None:
    bounds = [samples.scalar(value, w.dtype, w.device) for w, value in zip(listed, thresholds, strict=True)]
    expected = [int(oracle.pruned(w, t).sum()) for w, t in zip(listed, bounds, strict=True)]
    found = ops.count_pruned(listed, bounds)
    assert found.tolist() == expected, "wrong counts"
    most_bytes(launches, payload_of(listed) + 8 * len(listed) * len(launches))


def counts_of(launches: list[LaunchReport], dtypes: Sequence[torch.dtype]) -> None:
    """Ties with T in every place of an access, and T that prune nothing where there are zeros."""
    listed, coarse = weight_list(*dtypes), weight_list(*dtypes, coarse=True)
    rest = [0.25] * (len(listed) - 6)
    for weights, thresholds in (
        (listed, [0.3, 1.0, 1.0, NAN, 0.5, 0.25, *rest]),
        (coarse, [0.5, 0.25, 1.0, 1.0, 0.0, 1.0, *rest]),
        (coarse, [0.25, -1.0, 1.0, 1.0, INF, 0.0, *rest]),
    ):
        launches.clear()
        count(launches, weights, thresholds)


def histogram(launches: list[LaunchReport], dtype: torch.dtype, bits: int) -> None:
    nans = torch.full((3 * 256 * 16 // dtype.itemsize + 9,), NAN, dtype=dtype)  # three rounds of a CUDA block
    listed = [*weight_list(dtype), nans, samples.LAYOUTS["misaligned"](nans[:1031])]
    groups = [1 - i % 2 for i in range(len(listed))]
    width = 63 if dtype == FLOAT64 else 31
    keys = [oracle.scores(w).view(torch.int64 if dtype == FLOAT64 else torch.int32).long() for w in listed]
    nan = 0x7FF0000000000001 if dtype == FLOAT64 else 0x7F800001
    members = [
        torch.cat([k for k, g in zip(keys, groups, strict=True) if g == group]).clamp(max=nan) for group in (0, 1)
    ]
    for shift in (width - bits, width - bits - 6):
        prefixes = [int(own[5] >> (shift + bits)) for own in members]
        counts = ops.magnitude_histogram(listed, groups, torch.tensor([prefixes[0], prefixes[1]]), shift, bits)
        for own, prefix, row in zip(members, prefixes, counts, strict=True):
            below = own[own >> (shift + bits) == prefix] >> shift & (1 << bits) - 1
            assert row.equal(torch.bincount(below, minlength=1 << bits)), "wrong counts"
    counts = ops.magnitude_histogram(listed, groups, torch.tensor([nan >> bits] * 2), 0, bits)
    assert counts[:, nan & (1 << bits) - 1].tolist() == [int((own == nan).sum()) for own in members], "NaN is one key"
    assert counts.sum(1).tolist() == [int((own >> bits == nan >> bits).sum()) for own in members]
    done = ops.magnitude_histogram(listed, groups, torch.tensor([-1, -1]), width - bits, bits)
    assert not done.any(), "a group that is done counts nothing"


CASES = [
    *(Case(f"count {str(dtype)[6:]}", partial(counts_of, dtypes=(dtype,))) for dtype in samples.DTYPES),
    *(
        Case(f"count mixed, {str(dtypes[0])[6:]} first", partial(counts_of, dtypes=dtypes))
        for dtypes in ((FLOAT32, FLOAT64), (BFLOAT16, FLOAT64), (FLOAT16, FLOAT64), (FLOAT64, FLOAT32))
    ),
    *(
        Case(f"histogram of {bits} bits, {str(dtype)[6:]}", partial(histogram, dtype=dtype, bits=bits))
        for dtype, bits in (
            *((FLOAT32, bits) for bits in (1, 8)),
            (BFLOAT16, 7),
            (FLOAT64, 8),
            *((dtype, 12) for dtype in samples.DTYPES),  # more than fit at once
        )
    ),
]
