"""Convolution and transposed convolution with P(w), which backward computes again."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from feather_kernels.autograd.recompute import cast_like_autocast, may_recompute, recompute, weight_gradient
from feather_kernels.autograd.threshold import SparseWeight, ops, threshold


def recomputing_convolution(x: Tensor, sparse: SparseWeight, bias: Tensor | None, *arguments: Any) -> Tensor:
    """Compute ``torch.convolution(x, P(w), bias, *arguments)``; ``recomputing_linear`` says when P(w) is kept.

    Args:
        x: (N, C, *) or (C, *).
        sparse: the arguments of P(w), with autocast's dtype, or None where autocast is off.
        bias: (out,) or None.
        arguments: stride, padding, dilation, transposed, output_padding, groups.
    """
    batched = x.dim() == sparse.weight.dim()
    x = x if batched else x.unsqueeze(0)
    if may_recompute(x):
        x, bias = cast_like_autocast(x, bias, sparse.dtype)
        y = RecomputingConvolution.apply(x, bias, arguments, *sparse)
    else:
        y = torch.convolution(x, threshold(*sparse), bias, *arguments)
    return y if batched else y.squeeze(0)


class RecomputingConvolution(Function):
    """Takes x (N, C, *), bias or None, the other arguments of convolution as a tuple, then those of ``threshold``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, convolution: tuple[Any, ...], *arguments: Any) -> Tensor:
        weight, t, grad_scale, ctx.power, ctx.dtype = arguments
        ctx.convolution, ctx.bias_shape = convolution, None if bias is None else list(bias.shape)
        ctx.save_for_backward(x, weight, t, grad_scale)
        return torch.convolution(
            x, ops.threshold.default(weight, t, ctx.power, out_dtype=ctx.dtype), bias, *convolution
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, t, grad_scale = ctx.saved_tensors
        sparse = SparseWeight(weight, t, grad_scale, ctx.power, ctx.dtype)
        needs_input, needs_bias, _, needs_weight = ctx.needs_input_grad[:4]
        if needs_input:
            value = recompute(sparse, grad)
        else:  # only its shape and dtype are read
            value = sparse.weight.new_empty((), dtype=ctx.dtype).expand(sparse.weight.shape)
        grad_input, grad_weight, grad_bias = torch.ops.aten.convolution_backward.default(
            grad, x, value, ctx.bias_shape, *ctx.convolution, [needs_input, needs_weight, needs_bias]
        )
        if needs_weight:
            grad_weight = weight_gradient(grad_weight, sparse)
        return grad_input, grad_bias, None, grad_weight, None, None, None, None
