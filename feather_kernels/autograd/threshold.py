"""The thresholding operator as a differentiable function, from which layers and functions get P(w).

Backward needs references to the weight and its threshold, and nothing at grad_scale 1.
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
    """The arguments of ``threshold``.

    Attributes:
        weight: w.
        t: T, 0-dim, in the compute dtype.
        grad_scale: 0-dim, like ``t``, or None for 1.
        power: p.
        dtype: of P(w), or None for the weight's.
    """

    weight: Tensor
    t: Tensor
    grad_scale: Tensor | None
    power: float
    dtype: torch.dtype | None = None


def threshold(
    weight: Tensor, t: Tensor, grad_scale: Tensor | None, power: float, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Return P(w) with the scaled straight-through gradient.

    The derivative of the operator itself is not used (straight-through estimator; Feather, section 3). The op checks
    the arguments.

    Args:
        weight: w, of any shape and strides.
        t: T, 0-dim, in the compute dtype.
        grad_scale: 0-dim, like ``t``, or None for 1.
        power: p.
        out_dtype: dtype of the result, or None for the weight's.
    """
    if transforms_active() or forward_mode_active():
        return TransformableThreshold.apply(weight, t, grad_scale, power, out_dtype)
    if tracing():
        refuse_onnx()
        with torch.no_grad():  # the trace would record a Function as Python; backward of the traced op raises
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
    """``P(w)`` outside of transforms, and for torch.compile, which refuses a Function with a jvp.

    It has no ``setup_context``: for a Function that has one, torch binds the signature at every call, in about 15 us.
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
    """Return ``g * (1 where kept, grad_scale where pruned)`` in the weight's dtype.

    It is one kernel, or torch's own ops, with the same bits, if a compiler can fuse them or a derivative is wanted.
    """
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return scaled_gradient(grad, weight, t, grad_scale).to(weight.dtype)
    return ops.scale_pruned_grad.default(grad, weight, t, grad_scale)
