"""Checks of the elementwise kernels (see cases.py); a mutant of theirs should fail one."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from tests.mutation.cases import (
    BFLOAT16,
    CPU,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INF,
    NAN,
    TAILS,
    Case,
    most_bytes,
    whole_blocks_are_wide,
)
from tests.support import oracle, samples
from tools.ptx_executor.execution import LaunchReport

ops = torch.ops.feather_kernels
LENGTH = 2501  # more than one block of any kernel, the last one not full
ALIGNED, MISALIGNED = "aligned", "misaligned"


@cache
def weights(value: float, dtype: torch.dtype) -> Tensor:
    """61 weights with all that is special, over and over: each comes to every place of a thread.

    Kernels are unrolled, so that every place has instructions of its own, in whole and in cut blocks.
    """
    t = samples.scalar(value if 0 < value < INF else 0.3, dtype, CPU).to(dtype)
    integer = oracle.INTEGERS[dtype.itemsize]
    near = (t.view(integer) + torch.tensor([-2, -1, 0, 1, 2, 3, 9, 100], dtype=integer)).view(dtype)
    info = torch.finfo(dtype)
    tiny = info.smallest_normal
    special = torch.tensor([0.0, tiny * info.eps, tiny, 1.0, info.max, INF, NAN], dtype=FLOAT64).to(dtype)
    far = t * torch.tensor([1.1, 1.5, 2.0, 7.0, 500.0, 520.0, 16000.0, 17000.0]).to(dtype)
    chosen = torch.cat([near, special, far])
    chosen = torch.cat([chosen, -chosen, samples.boundary_weights(t, dtype)[45:60]])
    return chosen.repeat(LENGTH // len(chosen) + 1)[:LENGTH]


@cache
def boundary(value: float, dtype: torch.dtype) -> Tensor:
    """Every float around T, and magnitudes up to far beyond it."""
    return samples.boundary_weights(samples.scalar(value, dtype, CPU), dtype)[:-1]


class Form(NamedTuple):
    """The first ``length`` elements of lists: of weights and of what is written (a gradient, a result).

    16 bytes divide their addresses (ALIGNED) or not.
    """

    length: int | None
    weights: str
    written: str

    def laid_out(self, tensor: Tensor, layout: str) -> Tensor:
        return samples.LAYOUTS[MISALIGNED](tensor[: self.length]) if layout == MISALIGNED else tensor[: self.length]


BLOCKS = 2048  # elements that fill the blocks of any kernel
WHOLE = [Form(None, ALIGNED, ALIGNED), Form(None, MISALIGNED, MISALIGNED)]
FORMS = [
    Form(BLOCKS, ALIGNED, ALIGNED),
    *(Form(length, ALIGNED, MISALIGNED) for length in (None, 516, 896, 1023)),
    *(Form(length, layout, layout) for length in TAILS for layout in (ALIGNED, MISALIGNED)),
]


@cache
def exact_values(make: Callable[..., Tensor], value: float, dtype: torch.dtype, p: float) -> np.ndarray:
    return oracle.threshold(make(value, dtype), samples.scalar(value, dtype, CPU), p)


def most_ulps(out_dtype: torch.dtype, p: float) -> float:
    """The contract's bound; for square roots what the formula keeps, which an approximate root alone does not."""
    if out_dtype.itemsize == 2:
        return 0.55
    return 1.5 if p == 2 else 2.0


def check_zeros(out: Tensor, pruned: Tensor) -> None:
    zeros = out[pruned]
    assert oracle.same_bits(zeros, torch.zeros_like(zeros)), "pruned weights give +0, not the least denormal"


def threshold(
    launches: list[LaunchReport], dtype: torch.dtype, out_dtype: torch.dtype, p: float, values: tuple[float, ...]
) -> None:
    calls = [(weights, form, value) for form in WHOLE for value in values]
    calls += [(boundary, form, values[0]) for form in WHOLE]
    calls += [(weights, form, values[0]) for form in FORMS]
    for make, form, value in calls:
        w, t = form.laid_out(make(value, dtype), form.weights), samples.scalar(value, dtype, CPU)
        unwritten = torch.full((len(make(value, dtype)),), 7.0 if math.isnan(value) else NAN, dtype=out_dtype)
        out = form.laid_out(unwritten, form.written)
        launches.clear()
        ops.threshold.out(w, t, p, out=out)
        most_bytes(launches, w.numel() * (dtype.itemsize + out_dtype.itemsize))
        if form.length == BLOCKS:
            whole_blocks_are_wide(launches, "threshold_kernel", scalars=1)
        if out_dtype == FLOAT64 != dtype:  # computed in float32
            assert oracle.same_bits(out, out.float().double())
            out = out.float()
        assert oracle.ulp_error(out, exact_values(make, value, dtype, p)[: form.length]) <= most_ulps(out_dtype, p)
        check_zeros(out, torch.from_numpy(oracle.pruned(w, t)))
        if value <= 0:
            assert oracle.same_bits(out, w.to(out.dtype)), "a threshold of 0 or less changes nothing"
        elif out_dtype in (FLOAT16, BFLOAT16):
            assert oracle.same_bits(out, ops.threshold(w.float(), t, p).to(out_dtype)), "the float32 result, rounded"


def gradient(
    launches: list[LaunchReport], gradient_dtype: torch.dtype, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    calls = [
        (form, value, factor)
        for form in WHOLE
        for value, factor in ((EXACT, 0.3), (0.3, 0.3), (0.0, 0.5), (-1.0, 0.5), (NAN, 0.5))
    ]
    for form, value, factor in [*calls, *((form, EXACT, 0.3) for form in FORMS)]:
        w = weights(value, dtype)
        g = form.laid_out(samples.gradients(w, gradient_dtype), form.written)
        w = form.laid_out(w, form.weights)
        t, scale = (samples.scalar(number, dtype, CPU) for number in (value, factor))
        launches.clear()
        out = ops.scale_pruned_grad(g, w, t, scale, out_dtype=out_dtype)
        most_bytes(launches, w.numel() * (dtype.itemsize + out_dtype.itemsize + gradient_dtype.itemsize))
        if form.length == BLOCKS:
            whole_blocks_are_wide(launches, "scale_kernel", scalars=2)
        assert oracle.ulp_error(out, oracle.scaled_gradient(g, w, t, scale.item())) <= 0.51, (
            "one rounding, of a float32 product"
        )


def round_the_grid(launches: list[LaunchReport], op: str) -> None:
    """More elements than the largest grid of the CUDA backend handles at once: its threads go round."""
    blocks, threads = 1 << 13, 256
    w = torch.randn(blocks * threads * 4 + 5003, generator=torch.Generator().manual_seed(0))
    t, half = torch.tensor(0.3), torch.tensor(0.5)
    launches.clear()
    pruned = torch.from_numpy(oracle.pruned(w, t))
    if op == "scale":
        assert ops.scale_pruned_grad(w, w, t, half).equal(torch.where(pruned, 0.5 * w, w))
    else:
        assert ops.threshold(w, t, INF).equal(torch.where(pruned, 0.0, w))
    assert launches[-1].grid[0] == blocks, "the largest grid"


EXACT = 0.3125  # of every dtype, so that weights tie with it
CAST_FOR_CUDA = ("triton",)  # backends that have kernels for these dtypes
ORDINARY = (0.3, 1e-42, 1.9999, 1e30, 3e38, INF, 0.0, -1.0, NAN)
CASES = [
    *(
        Case(
            f"threshold {str(dtype)[6:]}, p = {p}", partial(threshold, dtype=dtype, out_dtype=dtype, p=p, values=all_t)
        )
        for dtype, all_t in (
            (FLOAT32, ORDINARY),
            (BFLOAT16, (EXACT, 0.3, 0.0, NAN)),
            (FLOAT64, (0.3, 1e-310, 0.0, NAN)),
        )
        for p in (1.0, 2.0, 3.0, INF)
    ),
    *(
        Case(
            f"threshold {str(dtype)[6:]} to {str(out)[6:]}",
            partial(threshold, dtype=dtype, out_dtype=out, p=3.0, values=(EXACT, 0.3, 0.0, NAN)),
        )
        for dtype, out in ((FLOAT32, BFLOAT16), (FLOAT32, FLOAT16), (FLOAT16, FLOAT16))
    ),
    *(
        Case(
            f"threshold {str(dtype)[6:]} to {str(out)[6:]}, p = {p}",
            partial(threshold, dtype=dtype, out_dtype=out, p=p, values=(EXACT, 0.3, 0.0, -1.0, NAN)),
        )
        for dtype, out, p in ((FLOAT32, out, p) for out in (FLOAT16, BFLOAT16) for p in (1.0, 2.0, INF))
    ),
    *(
        Case(
            f"threshold {str(dtype)[6:]} to {str(out)[6:]}, p = {p}",
            partial(threshold, dtype=dtype, out_dtype=out, p=p, values=(EXACT, 0.3, 0.0, -1.0, NAN)),
            CAST_FOR_CUDA,
        )
        for dtype, out, p in (
            (BFLOAT16, FLOAT32, 3.0),
            (FLOAT16, FLOAT32, 2.0),
            (FLOAT32, FLOAT64, 1.0),
            (BFLOAT16, FLOAT16, INF),
            (FLOAT64, FLOAT32, 3.0),
            (FLOAT64, FLOAT32, 2.0),
            (FLOAT64, FLOAT32, 1.0),
            (FLOAT64, FLOAT32, INF),
        )
    ),
    *(
        Case(
            f"threshold {str(dtype)[6:]}, p = {p}",
            partial(threshold, dtype=dtype, out_dtype=dtype, p=p, values=all_t),
            ("triton", "cuda") if p in (1.0, 2.0, INF) else ("cuda",),
        )
        for dtype, p, all_t in ((FLOAT16, p, (EXACT, 0.3, 0.0, NAN)) for p in (1.0, 2.0, INF))
    ),
    *(
        Case(
            f"gradient {str(g)[6:]} of {str(w)[6:]} to {str(out)[6:]}",
            partial(gradient, gradient_dtype=g, dtype=w, out_dtype=out),
        )
        for g, w, out in (
            (FLOAT32, FLOAT32, FLOAT32),
            (BFLOAT16, FLOAT32, FLOAT32),
            (FLOAT16, FLOAT32, FLOAT32),
            (BFLOAT16, FLOAT32, BFLOAT16),
            (FLOAT16, FLOAT32, FLOAT16),
            (BFLOAT16, BFLOAT16, BFLOAT16),
            (FLOAT16, FLOAT16, FLOAT16),
            (FLOAT64, FLOAT64, FLOAT64),
        )
    ),
    *(
        Case(
            f"gradient {str(g)[6:]} of {str(w)[6:]} to {str(out)[6:]}",
            partial(gradient, gradient_dtype=g, dtype=w, out_dtype=out),
            CAST_FOR_CUDA,
        )
        for g, w, out in (
            (FLOAT16, BFLOAT16, BFLOAT16),
            (FLOAT64, FLOAT32, FLOAT32),
            (FLOAT16, FLOAT64, FLOAT64),
        )
    ),
    *(Case(f"round the grid: {op}", partial(round_the_grid, op=op), ("cuda",)) for op in ("threshold", "scale")),
]
