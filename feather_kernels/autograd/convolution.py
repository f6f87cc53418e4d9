"""Convolution and transposed convolution with P(w) that keep no P(w) between forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from feather_kernels.autograd.lean import cast_like_autocast, recompute, runs_lean, weight_gradient
from feather_kernels.autograd.threshold import ops, threshold


def lean_convolution(
    x: Tensor,
    weight: Tensor,
    t: Tensor,
    grad_scale: Tensor | None,
    bias: Tensor | None,
    power: float,
    autocast: torch.dtype | None,
    *arguments: Any,
) -> Tensor:
    """``torch.convolution(x, P(w), bias, *arguments)``; x (N, C, *) or (C, *).

    ``arguments`` are stride, padding, dilation, transposed, output_padding, groups. ``autocast`` is the dtype that
    autocast computes in, None where it is off. Where P(w) is kept all the same: see ``lean_linear``.
    """
    batched = x.dim() == weight.dim()
    x = x if batched else x.unsqueeze(0)
    if runs_lean():
        x, bias = cast_like_autocast(x, bias, autocast)
        y = LeanConvolution.apply(x, weight, t, grad_scale, bias, power, autocast, *arguments)
    else:
        y = torch.convolution(x, threshold(weight, t, grad_scale, power, autocast), bias, *arguments)
    return y if batched else y.squeeze(0)


class LeanConvolution(Function):
    """Inputs: x (N, C, *), weight, threshold, grad_scale or None, bias or None, power, dtype, convolution's arguments.

    ``dtype`` is that of P(w), None for the weight's own; x and bias must have it already.
    """

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
        *arguments: Any,
    ) -> Tensor:
        ctx.power, ctx.dtype, ctx.arguments = power, dtype, arguments
        ctx.bias_shape = None if bias is None else list(bias.shape)
        ctx.save_for_backward(x, weight, t, grad_scale)
        return torch.convolution(x, ops.threshold.default(weight, t, power, out_dtype=dtype), bias, *arguments)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, t, grad_scale = ctx.saved_tensors
        needs_input, needs_weight, _, _, needs_bias = ctx.needs_input_grad[:5]
        if needs_input:
            sparse = recompute(weight, t, grad_scale, ctx.power, ctx.dtype, grad)
        else:  # only its shape and dtype are read
            sparse = weight.new_empty((), dtype=ctx.dtype).expand(weight.shape)
        grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward.default(
            grad, x, sparse, ctx.bias_shape, *ctx.arguments, [needs_input, needs_weight, needs_bias]
        )
        if needs_weight:
            grad_weight = weight_gradient(grad_weight, weight, t, grad_scale)
        unused = (None,) * (2 + len(ctx.arguments))
        return grad_input, grad_weight, None, None, grad_bias, *unused
