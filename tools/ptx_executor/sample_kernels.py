"""Small Triton kernels for the executor's own tests: correct ones, then ones with a planted bug."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def copy(source, target, numel, BLOCK: tl.constexpr):  # noqa: N803
    """target[i] = source[i]."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    tl.store(target + offsets, tl.load(source + offsets, mask=inside, other=0.0), mask=inside)


@triton.jit
def cast(source, target, numel, BLOCK: tl.constexpr):  # noqa: N803
    """target[i] = source[i] in the target's type."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    values = tl.load(source + offsets, mask=inside, other=0.0)
    tl.store(target + offsets, values.to(target.dtype.element_ty), mask=inside)


@triton.jit
def sum_rows(source, sums, columns: tl.constexpr):
    """sums[row] = the sum of row program_id of a (rows, columns) source."""
    row = tl.program_id(0)
    tl.store(sums + row, tl.sum(tl.load(source + row * columns + tl.arange(0, columns)), axis=0))


@triton.jit
def histogram(source, counts, numel, BINS: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """counts[b] += how many of the int32 source are b."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < numel
    bins = tl.load(source + offsets, mask=inside, other=0)
    tl.atomic_add(counts + tl.arange(0, BINS), tl.histogram(bins, BINS, mask=inside))


@triton.jit
def double_in_table(pointers, numels, BLOCK: tl.constexpr):  # noqa: N803
    """Every float32 tensor of the int64 table times two, in place; one program each."""
    tensor = tl.load(pointers + tl.program_id(0)).to(tl.pointer_type(tl.float32))
    numel = tl.load(numels + tl.program_id(0))
    for start in range(0, numel, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        tl.store(tensor + offsets, tl.load(tensor + offsets, mask=offsets < numel) * 2, mask=offsets < numel)


@triton.jit
def quotient(a, b, target, BLOCK: tl.constexpr):  # noqa: N803
    """target[i] = a[i] / b[i], which compiles to div.full."""
    offsets = tl.arange(0, BLOCK)
    tl.store(target + offsets, tl.load(a + offsets) / tl.load(b + offsets))


@triton.jit
def store_without_mask(source, target, numel, BLOCK: tl.constexpr):  # noqa: N803
    """Bug: the store has no mask."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(target + offsets, tl.load(source + offsets, mask=offsets < numel, other=0.0))


@triton.jit
def sum_without_atomic(source, total, numel, BLOCK: tl.constexpr):  # noqa: N803
    """Bug: programs read, add and write one number."""
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + offsets, mask=offsets < numel, other=0.0)
    tl.store(total, tl.load(total) + tl.sum(values, axis=0))
