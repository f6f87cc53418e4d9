"""Inputs that every op is tested on: boundary values, layouts, sizes."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from feather_kernels.cli.selftest import oracle as exact
from tests.support.oracle import compute_dtype

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
POWERS = (1.0, 2.0, 3.0, math.inf)  # of every backend
OTHER_POWERS = (1.1, 1.5, 4.5, 7.0)  # of the reference
THRESHOLDS = (0.0123, 0.3, 1.0, 1.9999, 7.7, 1e-6, 1e-30, 1e30, 1e-42, math.inf, 0.0, -0.0, -1.0, math.nan)


def scalar(value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A 0-dim threshold for weights of ``dtype``."""
    return torch.tensor(value, dtype=compute_dtype(dtype), device=device)


def boundary_weights(t: Tensor, dtype: torch.dtype, count: int = 700, seed: int = 0) -> Tensor:
    """Weights at, next to and far from T, of both signs, with every special value of the dtype."""
    return exact.boundary_weights(t, dtype, neighbours=(40, 400), count=count, seed=seed)


def gradients(weights: Tensor, dtype: torch.dtype, seed: int = 1) -> Tensor:
    """Gradients of the weights' shape with special values among them."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randn(weights.numel(), generator=generator, dtype=torch.float64).to(dtype)
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=dtype)
    flat[: min(5, flat.numel())] = special[: flat.numel()]
    return flat.reshape(weights.shape)


def _misaligned(x: Tensor) -> Tensor:
    buffer = x.new_zeros(x.numel() + 1)
    view = buffer[1:].view(x.shape)
    view.copy_(x)
    return view


def _every_second(x: Tensor) -> Tensor:
    buffer = x.new_full((*x.shape, 2), 17.0)
    buffer[..., 0] = x
    return buffer[..., 0]


def _transposed(x: Tensor) -> Tensor:
    return x.transpose(0, -1).contiguous().transpose(0, -1) if x.dim() > 1 else x


def _channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x


def _expanded(x: Tensor) -> Tensor:
    return x[:1].expand(x.shape) if x.dim() > 0 and x.shape[0] > 0 else x


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "contiguous": lambda x: x,
    "misaligned": _misaligned,
    "strided": _every_second,
    "transposed": _transposed,
    "channels_last": _channels_last,
    "expanded": _expanded,
}
WRITABLE_LAYOUTS = {name: layout for name, layout in LAYOUTS.items() if name != "expanded"}
SHAPES = ((), (0,), (1,), (5,), (4, 0, 3), (17, 33), (2, 3, 5, 7), (8, 16, 3, 3))
LARGE = (131, 2049)  # many chunks and programs
