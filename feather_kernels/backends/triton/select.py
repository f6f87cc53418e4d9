"""Selection and counts over a list of tensors: one launch per pass, every result left on the device.

The tensors reach the kernels through a table of addresses, sizes and dtypes; a program handles one chunk of one tensor.
Integer counts by atomics do not depend on the order of programs. Keys: ``ops/schema.py`` and ``backends/radix.py``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from feather_kernels.backends import radix
from feather_kernels.backends.triton.math import is_pruned

BLOCK = 1024
LOOP = 8  # blocks a program
CHUNK = BLOCK * LOOP
CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}  # of dtypes in the table


class Table(NamedTuple):
    """Where the tensors and their chunks are: int64 on the device; and the tensors, kept alive."""

    tensors: Tensor  # (L, 4): address, elements, code of the dtype, row
    chunks: Tensor  # (C, 2): index of the tensor, first element
    kept: list[Tensor]


@triton.jit
def load_magnitudes(address, code, offsets, inside, DTYPE: tl.constexpr):
    """abs(w), in DTYPE, of elements of a tensor given by its address and the code of its dtype."""
    if DTYPE == tl.float64:
        w = tl.load(address.to(tl.pointer_type(tl.float64)) + offsets, mask=inside, other=0.0)
    elif code == 0:
        w = tl.load(address.to(tl.pointer_type(tl.float16)) + offsets, mask=inside, other=0.0).to(DTYPE)
    elif code == 1:
        w = tl.load(address.to(tl.pointer_type(tl.bfloat16)) + offsets, mask=inside, other=0.0).to(DTYPE)
    else:
        w = tl.load(address.to(tl.pointer_type(tl.float32)) + offsets, mask=inside, other=0.0)
    return tl.abs(w)


@triton.jit
def key_of(score, DTYPE: tl.constexpr):
    """The bits of a score as an ordered integer of its width; every NaN is the key behind inf."""
    if DTYPE == tl.float64:
        key = tl.minimum(score.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF, 0x7FF0000000000001)
    else:
        key = tl.minimum(score.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0x7F800001)
    return key


@triton.jit
def histogram_kernel(
    tensors, chunks, scales, prefixes, counts,
    SHIFT: tl.constexpr, BITS: tl.constexpr, SCALED: tl.constexpr, DTYPE: tl.constexpr,
    BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """Add the digits of one chunk to counts (R, 2^BITS), int64; scales (L,) in DTYPE, prefixes (R,) int64."""
    program = tl.program_id(0).to(tl.int64)
    index = tl.load(chunks + 2 * program)
    start = tl.load(chunks + 2 * program + 1)
    address, n = tl.load(tensors + 4 * index), tl.load(tensors + 4 * index + 1)
    code, row = tl.load(tensors + 4 * index + 2), tl.load(tensors + 4 * index + 3)
    prefix = tl.load(prefixes + row)
    BINS: tl.constexpr = 1 << BITS
    found = tl.zeros((BINS,), tl.int32)
    for i in range(LOOP):
        offsets = start + i * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < n
        score = load_magnitudes(address, code, offsets, inside, DTYPE)
        if SCALED:
            score *= tl.load(scales + index)
        key = key_of(score, DTYPE)
        wanted = inside & ((key >> (SHIFT + BITS)).to(tl.int64) == prefix)
        found += tl.histogram(((key >> SHIFT) & (BINS - 1)).to(tl.int32), BINS, mask=wanted)
    tl.atomic_add(counts + row * BINS + tl.arange(0, BINS), found.to(tl.int64), mask=found > 0)


@triton.jit
def smallest_above_kernel(
    tensors, chunks, scales, bounds, smallest,
    SCALED: tl.constexpr, DTYPE: tl.constexpr, NAN_KEY: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr,
):  # fmt: skip
    """Lower smallest (R,), int64, to the smallest key of one chunk that is above bounds (R,)."""
    program = tl.program_id(0).to(tl.int64)
    index = tl.load(chunks + 2 * program)
    start = tl.load(chunks + 2 * program + 1)
    address, n = tl.load(tensors + 4 * index), tl.load(tensors + 4 * index + 1)
    code, row = tl.load(tensors + 4 * index + 2), tl.load(tensors + 4 * index + 3)
    bound = tl.load(bounds + row)
    least = tl.full((BLOCK,), NAN_KEY, tl.int64)
    for i in range(LOOP):
        offsets = start + i * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < n
        score = load_magnitudes(address, code, offsets, inside, DTYPE)
        if SCALED:
            score *= tl.load(scales + index)
        key = key_of(score, DTYPE).to(tl.int64)
        least = tl.minimum(least, tl.where(inside & (key > bound), key, NAN_KEY))
    tl.atomic_min(smallest + row, tl.min(least, 0))


@triton.jit
def count_kernel(tensors, chunks, thresholds, counts, DTYPE: tl.constexpr, BLOCK: tl.constexpr, LOOP: tl.constexpr):
    """Add the number of pruned elements of one chunk to counts (L,), int64; thresholds (L,) in DTYPE."""
    program = tl.program_id(0).to(tl.int64)
    index = tl.load(chunks + 2 * program)
    start = tl.load(chunks + 2 * program + 1)
    address, n = tl.load(tensors + 4 * index), tl.load(tensors + 4 * index + 1)
    code = tl.load(tensors + 4 * index + 2)
    t = tl.load(thresholds + index)
    pruned = tl.zeros((BLOCK,), tl.int32)
    for i in range(LOOP):
        offsets = start + i * BLOCK + tl.arange(0, BLOCK)
        inside = offsets < n
        w = load_magnitudes(address, code, offsets, inside, DTYPE)
        pruned += (inside & is_pruned(w, t)).to(tl.int32)
    tl.atomic_add(counts + index, tl.sum(pruned, 0).to(tl.int64))


def magnitude_select(
    weights: Sequence[Tensor],
    groups: Sequence[int],
    rank: Tensor,
    scales: Tensor | None,
    caps: Tensor | None,
    hint: Tensor | None,
    out: Tensor,
) -> None:
    """Radix selection with the passes of this file."""
    del hint

    def histogram(rows: Sequence[int], prefix: Tensor, shift: int, bits: int, counts: Tensor) -> None:
        magnitude_histogram(weights, rows, prefix, shift, bits, scales, counts)

    def smallest_above(rows: Sequence[int], keys: Tensor) -> Tensor:
        smallest = torch.full_like(keys, radix.NAN_KEY[out.dtype])
        table = make_table(weights, rows)
        if len(table.chunks):
            smallest_above_kernel[(len(table.chunks),)](
                table.tensors, table.chunks, scales, keys, smallest,
                SCALED=scales is not None, DTYPE=_language_dtype(weights), NAN_KEY=radix.NAN_KEY[out.dtype],
                BLOCK=BLOCK, LOOP=LOOP,
            )  # fmt: skip
        return smallest

    radix.select(groups, rank, caps, out, histogram, smallest_above)


def magnitude_histogram(
    weights: Sequence[Tensor],
    groups: Sequence[int],
    prefix: Tensor,
    shift: int,
    bits: int,
    scales: Tensor | None,
    out: Tensor,
) -> None:
    """Fill ``out`` (G, 2^bits) with the counts of one radix pass."""
    out.zero_()
    table = make_table(weights, groups)
    if len(table.chunks):
        histogram_kernel[(len(table.chunks),)](
            table.tensors, table.chunks, scales, prefix.contiguous(), out,
            SHIFT=shift, BITS=bits, SCALED=scales is not None, DTYPE=_language_dtype(weights), BLOCK=BLOCK, LOOP=LOOP,
        )  # fmt: skip


def count_pruned(weights: Sequence[Tensor], thresholds: Sequence[Tensor], out: Tensor) -> None:
    """Fill ``out`` (L,) with the number of pruned elements of each weight."""
    out.zero_()
    for wide in (False, True):
        members = [i for i, w in enumerate(weights) if (w.dtype == torch.float64) == wide]
        if not members:
            continue
        table = make_table([weights[i] for i in members], members)
        counts = out.new_zeros(len(members))
        if len(table.chunks):
            t = torch.stack([thresholds[i] for i in members])
            dtype = tl.float64 if wide else tl.float32
            grid = (len(table.chunks),)
            count_kernel[grid](table.tensors, table.chunks, t, counts, DTYPE=dtype, BLOCK=BLOCK, LOOP=LOOP)
        index = torch.tensor(members).to(out.device, non_blocking=True)
        out.index_copy_(0, index, counts)


def make_table(weights: Sequence[Tensor], rows: Sequence[int]) -> Table:
    """The table of a list of tensors; layouts that are not dense are copied once."""
    flat = [_dense(w) for w in weights]
    entries = [(w.data_ptr(), w.numel(), CODES[w.dtype], row) for w, row in zip(flat, rows, strict=True)]
    chunks = [(index, start) for index, w in enumerate(flat) for start in range(0, w.numel(), CHUNK)]
    device = weights[0].device
    return Table(_upload(entries, 4, device), _upload(chunks, 2, device), flat)


def _dense(w: Tensor) -> Tensor:
    strides = w.stride()
    return w.detach().permute(sorted(range(w.dim()), key=lambda d: (-strides[d], d))).contiguous()


def _upload(rows: Sequence[Sequence[int]], width: int, device: torch.device) -> Tensor:
    table = torch.tensor(rows, dtype=torch.int64, pin_memory=device.type == "cuda").reshape(-1, width)
    return table.to(device, non_blocking=True)


def _language_dtype(weights: Sequence[Tensor]) -> tl.dtype:
    return tl.float64 if weights[0].dtype == torch.float64 else tl.float32
