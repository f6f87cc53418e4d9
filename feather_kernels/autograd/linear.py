"""``x P(w)^T + b`` that keeps no P(w) between forward and backward."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from feather_kernels.autograd.lean import cast_like_autocast, recompute, runs_lean, weight_gradient
from feather_kernels.autograd.threshold import ops, threshold


def lean_linear(
    x: Tensor,
    weight: Tensor,
    t: Tensor,
    grad_scale: Tensor | None,
    bias: Tensor | None,
    power: float,
    autocast: torch.dtype | None,
) -> Tensor:
    """``F.linear(x, P(w), bias)``: x (*, in), weight (out, in), bias (out,) or None -> (*, out).

    ``autocast`` is the dtype that autocast computes in, None where it is off. Inside torch.func transforms,
    forward-mode differentiation and tracers, and for nested or sparse x, torch's own op runs and P(w) is kept.
    """
    if not runs_lean() or x.is_nested or x.layout != torch.strided or x.dim() == 0 or weight.dim() != 2:
        return F.linear(x, threshold(weight, t, grad_scale, power, autocast), bias)
    x, bias = cast_like_autocast(x, bias, autocast)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    product = LeanLinear.apply(rows, weight, t, grad_scale, bias, power, autocast)
    return product.reshape(*x.shape[:-1], weight.shape[0])  # out here: what a Function returns must not be a view


class LeanLinear(Function):
    """Inputs: x (rows, in), weight, threshold, grad_scale or None, bias or None, power, dtype of P(w) or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        t: Tensor,
        grad_scale: Tensor | None,
        bias: Tensor | None,
        power: float,
        dtype: torch.dtype | None,
    ) -> Tensor:
        ctx.power, ctx.dtype = power, dtype
        ctx.save_for_backward(x, weight, t, grad_scale)
        return F.linear(x, ops.threshold.default(weight, t, power, out_dtype=dtype), bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, t, grad_scale = ctx.saved_tensors
        needs_input, needs_weight, _, _, needs_bias = ctx.needs_input_grad[:5]
        grad_input = grad_weight = grad_bias = None
        if needs_input:
            grad_input = grad.mm(recompute(weight, t, grad_scale, ctx.power, ctx.dtype, grad))
        if needs_weight:
            grad_weight = weight_gradient(grad.t().mm(x), weight, t, grad_scale)
        if needs_bias:
            grad_bias = grad.sum(0)
        return grad_input, grad_weight, None, None, grad_bias, None, None
