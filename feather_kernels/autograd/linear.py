"""``x P(w)^T + b`` that keeps no copy of the weight between forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from feather_kernels.autograd.threshold import eager_form, recompute, scale_weight_grad
from feather_kernels.ops import calls


class SparseLinear(Function):
    """Inputs: input (*, in), weight (out, in), threshold, grad_scale or None, bias (out,) or None, power, dtype.

    ``dtype`` is that of P(w), None for the weight's own; input and bias must have it already.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        input: Tensor,  # noqa: A002  (torch's name for it)
        weight: Tensor,
        threshold: Tensor,
        grad_scale: Tensor | None,
        bias: Tensor | None,
        power: float,
        dtype: torch.dtype | None,
    ) -> Tensor:
        sparse = calls.way(weight, threshold).threshold(weight, threshold, power, out_dtype=dtype)
        return F.linear(input, sparse, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, threshold, grad_scale, _, ctx.power, ctx.dtype = inputs
        ctx.save_for_backward(x, weight, threshold, grad_scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, threshold, grad_scale = ctx.saved_tensors
        needs_input, needs_weight, _, _, needs_bias = ctx.needs_input_grad[:5]
        way = calls.way(grad, x, weight, threshold, grad_scale)
        grad_input = grad_weight = grad_bias = None
        if needs_input:
            grad_input = grad.matmul(recompute(way, weight, threshold, grad_scale, ctx.power, ctx.dtype, grad))
        rows = grad.reshape(-1, grad.shape[-1])
        if needs_weight:
            grad_weight = rows.t().mm(x.reshape(-1, x.shape[-1]))
            grad_weight = scale_weight_grad(way, grad_weight, weight, threshold, grad_scale)
        if needs_bias:
            grad_bias = rows.sum(0)
        return grad_input, grad_weight, None, None, grad_bias, None, None


linear = eager_form(SparseLinear)
