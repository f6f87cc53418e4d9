"""How kernels read a list of tensors in one launch: each program looks up one chunk in a table of their addresses.

Chunks of aligned tensors are read 16 bytes at a time; the last block of a tensor and misaligned tensors are read under
a mask. Each storage dtype has its own table and launch.
"""

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from feather_kernels.backends.gpu import chunk_tables
from feather_kernels.backends.gpu.chunk_tables import ChunkTable
from feather_kernels.backends.triton.launch import Kernel
from feather_kernels.dtypes import NAN_KEY, compute_dtype

BLOCK = 1024
LOOP = 8  # blocks that a program reads
CHUNK = BLOCK * LOOP
STORED = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}
# kernels read globals of this type only
NAN_KEY_32 = tl.constexpr(NAN_KEY[torch.float32])
NAN_KEY_64 = tl.constexpr(NAN_KEY[torch.float64])


@triton.jit
def load_chunk(table):
    """Load (address, aligned, elements, row, index) of this program's chunk."""
    entry = table + tl.program_id(0).to(tl.int64) * 5
    address, elements, aligned = tl.load(entry), tl.load(entry + 1).to(tl.int32), tl.load(entry + 2)
    return address, aligned, elements, tl.load(entry + 3), tl.load(entry + 4)


@triton.jit
def load_magnitudes(address, aligned, first, elements, STORED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr):
    """Load abs(w), in DTYPE, of a chunk's elements first ... first + BLOCK - 1; NaN beyond its end.

    A whole block of an aligned chunk is loaded without a mask, hence by accesses of 128 bits.
    """
    pointer = address.to(tl.pointer_type(STORED))
    offsets = first + tl.arange(0, BLOCK)
    if (aligned != 0) & (first + BLOCK <= elements):
        w = tl.load(tl.multiple_of(pointer, 16) + offsets)
    else:
        w = tl.load(pointer + offsets, mask=offsets < elements, other=float("nan"))
    return tl.abs(w.to(DTYPE))


@triton.jit
def key_of(score, DTYPE: tl.constexpr):
    """The bits of a score as an ordered integer of its width; those of a NaN are its key or more."""
    if DTYPE == tl.float64:
        key = score.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        key = score.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    return key


@triton.jit
def clamp_nan(key, DTYPE: tl.constexpr):
    """The key; all NaNs share one, just above that of infinity."""
    return tl.minimum(key, NAN_KEY_64 if DTYPE == tl.float64 else NAN_KEY_32)


@triton.jit
def load_keys(
    address, aligned, first, elements, scale,
    SCALED: tl.constexpr, STORED: tl.constexpr, DTYPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Load the keys of the scores ``scale * abs(w)`` of a block; beyond the end of the chunk, the key of a NaN."""
    score = load_magnitudes(address, aligned, first, elements, STORED, DTYPE, BLOCK)
    if SCALED:
        score *= scale
    return key_of(score, DTYPE)


def make_tables(weights: Sequence[Tensor], rows: Sequence[int]) -> list[ChunkTable]:
    """Return the tables of a list of tensors with the row of each; layouts that are not dense are copied once."""
    return chunk_tables.make_tables(weights, rows, CHUNK)


def launch_chunks(
    kernel: Kernel, tables: Sequence[ChunkTable], specialization: tuple[Hashable, ...], *arguments: Any
) -> None:
    """Launch a kernel once for each table, with one program for each chunk.

    The kernel's parameters are chunks, ``arguments``, STORED, DTYPE, BLOCK and LOOP. Weights that are stored as STORED
    have the compute dtype DTYPE.

    Args:
        kernel: what to launch.
        tables: of the list of tensors.
        specialization: the constants among the arguments, and their types where those vary.
        arguments: the parameters in the middle.
    """
    for entries, dtype, _ in tables:
        stored, computed = STORED[dtype], STORED[compute_dtype(dtype)]
        kernel.launch(len(entries), (stored, *specialization), entries, *arguments, stored, computed, BLOCK, LOOP)
