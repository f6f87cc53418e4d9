"""``x P(w)^T + b``, where backward computes P(w) again."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch.autograd import Function
from torch.nn import functional as F

from feather_kernels.autograd.recompute import cast_like_autocast, may_recompute, recompute, weight_gradient
from feather_kernels.autograd.threshold import SparseWeight, ops, threshold

if TYPE_CHECKING:
    from torch import Tensor


def recomputing_linear(x: Tensor, sparse: SparseWeight, bias: Tensor | None) -> Tensor:
    """Compute ``F.linear(x, P(w), bias)``, (*, out).

    Inside torch.func transforms, forward-mode differentiation and tracers, and for nested or sparse x, torch's own op
    runs and P(w) is kept.

    Args:
        x: (*, in).
        sparse: the arguments of P(w), with autocast's dtype, or None where autocast is off.
        bias: (out,) or None.
    """
    weight = sparse.weight
    if not may_recompute(x) or x.dim() == 0 or weight.dim() != 2:
        return F.linear(x, threshold(*sparse), bias)
    x, bias = cast_like_autocast(x, bias, sparse.dtype)
    if x.dim() == 2:
        return RecomputingLinear.apply(x, bias, *sparse)  # not a view: FSDP2 cannot hook in-place operations on one
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    product = RecomputingLinear.apply(rows, bias, *sparse)
    return product.reshape(*x.shape[:-1], weight.shape[0])  # not in the Function, which must not return a view


class RecomputingLinear(Function):
    """Takes x (rows, in), bias or None, then the arguments of ``threshold``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, *arguments: Any) -> Tensor:
        weight, t, grad_scale, ctx.power, ctx.dtype = arguments
        ctx.save_for_backward(x, weight, t, grad_scale)
        return F.linear(x, ops.threshold.default(weight, t, ctx.power, out_dtype=ctx.dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, t, grad_scale = ctx.saved_tensors
        sparse = SparseWeight(weight, t, grad_scale, ctx.power, ctx.dtype)
        needs_input, needs_bias, needs_weight = ctx.needs_input_grad[:3]
        grad_input = grad.mm(recompute(sparse, grad)) if needs_input else None
        grad_bias = grad.sum(0) if needs_bias else None
        grad_weight = weight_gradient(grad.t().mm(x), sparse) if needs_weight else None
        return grad_input, grad_bias, grad_weight, None, None, None, None
