"""Convolution and transposed convolution with P(w) that keep no copy of the weight between forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from feather_kernels.autograd.threshold import eager_form, recompute, scale_weight_grad
from feather_kernels.ops import calls


class SparseConvolution(Function):
    """Inputs: input (N, C, *), weight, threshold, grad_scale or None, bias or None, power, dtype, then the arguments of
    ``aten::convolution``: stride, padding, dilation, transposed, output_padding, groups.

    ``dtype`` is that of P(w), None for the weight's own; input and bias must have it already.
    """  # noqa: D205

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
        *arguments: Any,
    ) -> Tensor:
        sparse = calls.way(weight, threshold).threshold(weight, threshold, power, out_dtype=dtype)
        return torch.convolution(input, sparse, bias, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, threshold, grad_scale, bias, ctx.power, ctx.dtype, *ctx.arguments = inputs
        ctx.bias_shape = None if bias is None else list(bias.shape)
        ctx.save_for_backward(x, weight, threshold, grad_scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, threshold, grad_scale = ctx.saved_tensors
        needs_input, needs_weight, _, _, needs_bias = ctx.needs_input_grad[:5]
        way = calls.way(grad, x, weight, threshold, grad_scale)
        if needs_input:
            sparse = recompute(way, weight, threshold, grad_scale, ctx.power, ctx.dtype, grad)
        else:  # only its shape and dtype are read
            sparse = weight.new_empty((), dtype=ctx.dtype).expand(weight.shape)
        grad_input, grad_weight, grad_bias = way.convolution_backward(
            grad, x, sparse, ctx.bias_shape, *ctx.arguments, [needs_input, needs_weight, needs_bias]
        )
        if needs_weight:
            grad_weight = scale_weight_grad(way, grad_weight, weight, threshold, grad_scale)
        unused = (None,) * (2 + len(ctx.arguments))
        return grad_input, grad_weight, None, None, grad_bias, *unused


convolution = eager_form(SparseConvolution)
