"""The elementwise ops, which read and write each byte once.

Kernels see dense memory in storage order; 64-bit offsets; whole blocks without a mask, so that accesses are 128 bits
wide, and one masked tail. The block size is a fixed function of the dtypes: no autotuning, the same bits everywhere.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from feather_kernels.backends.layouts import flatten, write_back
from feather_kernels.backends.triton.launch import Kernel, is_aligned
from feather_kernels.backends.triton.math import is_pruned, threshold_value

CONSTANT_OF_POWER = {1.0: 1, 2.0: 2, 3.0: 3, math.inf: 0}  # power -> P of the kernel
BLOCK = 1024  # elements a program: 8 for each of 128 threads
WIDE = 1 << 31  # elements; from here on Triton passes their number in 64 bits
WIDE_BLOCK = 512  # for float64 arithmetic, whose values take two registers


@Kernel
@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["t_ptr"])
def threshold_kernel(w_ptr, t_ptr, out_ptr, n, P: tl.constexpr, BLOCK: tl.constexpr):
    """w_ptr, out_ptr: (n,) of any float dtype; t_ptr: 0-dim, float32 or float64."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    t = tl.load(t_ptr)
    if start + BLOCK <= n:
        w = tl.load(w_ptr + offsets).to(t.dtype)
        tl.store(out_ptr + offsets, threshold_value(w, t, P).to(out_ptr.dtype.element_ty))
    else:
        inside = offsets < n
        w = tl.load(w_ptr + offsets, mask=inside, other=0.0).to(t.dtype)
        tl.store(out_ptr + offsets, threshold_value(w, t, P).to(out_ptr.dtype.element_ty), mask=inside)


@Kernel
@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["t_ptr", "scale_ptr"])
def scale_kernel(g_ptr, w_ptr, t_ptr, scale_ptr, out_ptr, n, ARITHMETIC: tl.constexpr, BLOCK: tl.constexpr):
    """g_ptr, w_ptr, out_ptr: (n,); t_ptr, scale_ptr: 0-dim. ARITHMETIC: dtype of the product."""
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offsets = start + tl.arange(0, BLOCK)
    t, scale = tl.load(t_ptr), tl.load(scale_ptr)
    if start + BLOCK <= n:
        g = tl.load(g_ptr + offsets).to(ARITHMETIC)
        w = tl.load(w_ptr + offsets).to(t.dtype)
        scaled = tl.where(is_pruned(w, t), g * scale.to(ARITHMETIC), g)
        tl.store(out_ptr + offsets, scaled.to(out_ptr.dtype.element_ty))
    else:
        inside = offsets < n
        g = tl.load(g_ptr + offsets, mask=inside, other=0.0).to(ARITHMETIC)
        w = tl.load(w_ptr + offsets, mask=inside, other=0.0).to(t.dtype)
        scaled = tl.where(is_pruned(w, t), g * scale.to(ARITHMETIC), g)
        tl.store(out_ptr + offsets, scaled.to(out_ptr.dtype.element_ty), mask=inside)


def threshold(w: Tensor, t: Tensor, p: float, out: Tensor) -> None:
    """Fill ``out`` with P(w).

    Raises:
        ValueError: there is no kernel for p.
    """
    power = CONSTANT_OF_POWER.get(p)
    if power is None:
        raise ValueError(f"power must be 1, 2, 3 or inf on the Triton backend, got {p}")
    flat_out, flat_w = flatten(out, w)
    n, block = w.numel(), WIDE_BLOCK if t.dtype == torch.float64 else BLOCK
    specialization = w.dtype, is_aligned(flat_w), out.dtype, is_aligned(flat_out), n < WIDE, power, block
    threshold_kernel.launch((n + block - 1) // block, specialization, flat_w, t, flat_out, n, power, block)
    write_back(flat_out, out)


def scale_pruned_grad(g: Tensor, w: Tensor, t: Tensor, grad_scale: Tensor, out: Tensor) -> None:
    """Fill ``out`` with the scaled gradient."""
    flat_out, flat_g, flat_w = flatten(out, g, w)
    arithmetic = tl.float64 if torch.float64 in (g.dtype, t.dtype) else tl.float32
    n = w.numel()
    dtypes = g.dtype, w.dtype, out.dtype
    specialization = dtypes, is_aligned(flat_g), is_aligned(flat_w), is_aligned(flat_out), n < WIDE
    programs = (n + BLOCK - 1) // BLOCK
    scale_kernel.launch(programs, specialization, flat_g, flat_w, t, grad_scale, flat_out, n, arithmetic, BLOCK)
    write_back(flat_out, out)
