"""The thresholding operator as a differentiable function: the one place where layers and functions get P(w).

What is saved for backward are references to the weight and its threshold, and nothing at grad_scale 1.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from feather_kernels.backends.reference import scaled_gradient
from feather_kernels.ops.onnx_export import refuse_onnx
from feather_kernels.torch_private import forward_mode_active, tracing, transforms_active

ops = torch.ops.feather_kernels


class SparseWeight(NamedTuple):
    """What P(w) is computed from: the arguments of ``threshold``."""

    weight: Tensor
    t: Tensor
    grad_scale: Tensor | None
    power: float
    dtype: torch.dtype | None = None


def threshold(
    weight: Tensor, t: Tensor, grad_scale: Tensor | None, power: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    """P(w) in ``out_dtype`` (default the weight's), with the scaled straight-through gradient.

    Arguments are as in ``functional.threshold`` and are checked by the op; ``grad_scale`` None is 1. The derivative of
    the operator itself is not used (straight-through estimator; Feather, section 3).
    """
    if transforms_active() or forward_mode_active():
        return TransformableThreshold.apply(weight, t, grad_scale, power, out_dtype)
    if tracing():
        refuse_onnx()
        with torch.no_grad():  # a Function would stand in the trace as Python; backward of the traced op raises
            return ops.threshold.default(weight, t, power, out_dtype=out_dtype)
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return ops.threshold.default(weight, t, power, out_dtype=out_dtype)
    return PlainThreshold.apply(weight, t, grad_scale, power, out_dtype)


class TransformableThreshold(Function):
    """``P(w)`` for torch.func and forward-mode differentiation.

    Inputs: weight, threshold (0-dim), grad_scale (0-dim, or None for 1), power, out_dtype. The tangent of P(w), like
    the gradient, is scaled on pruned weights.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor, t: Tensor, grad_scale: Tensor | None, power: float, out_dtype: torch.dtype | None
    ) -> Tensor:
        return ops.threshold.default(weight, t, power, out_dtype=out_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, t, grad_scale, _, _ = inputs
        ctx.weight_dtype, ctx.out_dtype, ctx.scaled = weight.dtype, output.dtype, grad_scale is not None
        if ctx.scaled:
            ctx.save_for_backward(weight, t, grad_scale)
            ctx.save_for_forward(weight, t, grad_scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        if not ctx.scaled:
            return grad.to(ctx.weight_dtype), None, None, None, None
        weight, t, grad_scale = ctx.saved_tensors  # once: activation checkpointing allows no second unpacking
        return scale_pruned_grad(grad, weight, t, grad_scale), None, None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        if not ctx.scaled:
            return tangent.to(ctx.out_dtype)
        return scaled_gradient(tangent, *ctx.saved_tensors).to(ctx.out_dtype)


class PlainThreshold(Function):
    """The same outside of transforms, and for torch.compile, which refuses a Function with a jvp.

    torch binds the signature of a Function in setup_context style anew on every call, about 15 us; not of this one.
    """

    @staticmethod
    def forward(
        ctx: Any, weight: Tensor, t: Tensor, grad_scale: Tensor | None, power: float, out_dtype: torch.dtype | None
    ) -> Tensor:
        ctx.weight_dtype, ctx.scaled = weight.dtype, grad_scale is not None
        if ctx.scaled:
            ctx.save_for_backward(weight, t, grad_scale)
        return ops.threshold.default(weight, t, power, out_dtype=out_dtype)

    backward = staticmethod(TransformableThreshold.backward)


def scale_pruned_grad(grad: Tensor, weight: Tensor, t: Tensor, grad_scale: Tensor) -> Tensor:
    """``g * (1 where kept, grad_scale where pruned)`` in the weight's dtype.

    One kernel; but torch's own ops, with the same bits, where a compiler can fuse them or a derivative is wanted.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return scaled_gradient(grad, weight, t, grad_scale).to(weight.dtype)
    return ops.scale_pruned_grad.default(grad, weight, t, grad_scale)
