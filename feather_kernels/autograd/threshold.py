"""The thresholding operator and its gradient scaling as torch.autograd.Functions.

Each Function is written once, in setup_context style, which torch.func needs. Torch binds the signature of such a
Function on every call (about 15 us), so eager calls go through an equivalent ctx-style class that ``eager_form`` makes
from it. All that is saved for backward are references to the weight and its threshold, and nothing at grad_scale 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

from feather_kernels.ops import calls


def eager_form(function: type[Function]) -> Callable[..., Any]:
    """``function.apply`` at the call cost of a ctx-style Function, where no functorch transform is active."""
    forward, setup_context = function.forward, function.setup_context

    class Eager(Function):
        @staticmethod
        def forward(ctx: Any, *args: Any) -> Any:
            output = forward(*args)
            setup_context(ctx, args, output)
            return output

        backward = staticmethod(function.backward)

    Eager.__name__ = function.__name__

    transforms_active, apply_function, apply_eager = (
        torch._C._are_functorch_transforms_active, function.apply, Eager.apply,
    )  # fmt: skip

    def apply(*args: Any) -> Any:
        return apply_function(*args) if transforms_active() else apply_eager(*args)

    return apply


class Threshold(Function):
    """``P(w)`` forward; backward ``g * (1 where kept, grad_scale where pruned)`` in the weight's dtype.

    Inputs: weight, threshold (0-dim), grad_scale (0-dim, or None for 1), power, out_dtype. The derivative of the
    operator itself is not used (straight-through estimator; Feather, section 3).
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        weight: Tensor, threshold: Tensor, grad_scale: Tensor | None, power: float, out_dtype: torch.dtype | None
    ) -> Tensor:
        return calls.way(weight, threshold).threshold(weight, threshold, power, out_dtype=out_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        weight, threshold, grad_scale, _, _ = inputs
        ctx.weight_dtype = weight.dtype
        ctx.scaled = grad_scale is not None
        if ctx.scaled:
            ctx.save_for_backward(weight, threshold, grad_scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not ctx.needs_input_grad[0]:
            return (None,) * 5
        if not ctx.scaled:
            return grad.to(ctx.weight_dtype), None, None, None, None
        weight, threshold, grad_scale = ctx.saved_tensors  # once: activation checkpointing allows no second unpacking
        way = calls.way(grad, weight, threshold, grad_scale)
        scaled = scale_pruned_grad(way, grad, weight, threshold, grad_scale, ctx.weight_dtype)
        return scaled, None, None, None, None


class ScalePrunedGrad(Function):
    """``g * (1 where kept, grad_scale where pruned)``: linear in g, and its own derivative (for double backward)."""

    generate_vmap_rule = True

    @staticmethod
    def forward(grad: Tensor, weight: Tensor, threshold: Tensor, grad_scale: Tensor, out_dtype: torch.dtype) -> Tensor:
        way = calls.way(grad, weight, threshold, grad_scale)
        return way.scale_pruned_grad(grad, weight, threshold, grad_scale, out_dtype=out_dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        grad, weight, threshold, grad_scale, _ = inputs
        ctx.save_for_backward(weight, threshold, grad_scale)
        ctx.grad_dtype = grad.dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, threshold, grad_scale = ctx.saved_tensors
        way = calls.way(grad, weight, threshold, grad_scale)
        scaled = scale_pruned_grad(way, grad, weight, threshold, grad_scale, ctx.grad_dtype)
        return scaled, None, None, None, None


def scale_pruned_grad(
    way: calls.Way, grad: Tensor, weight: Tensor, threshold: Tensor, grad_scale: Tensor, out_dtype: torch.dtype
) -> Tensor:
    """``ScalePrunedGrad`` where the result must be differentiable (create_graph, torch.func), else the plain op."""
    if torch.is_grad_enabled():
        return _scale_pruned_grad(grad, weight, threshold, grad_scale, out_dtype)
    return way.scale_pruned_grad(grad, weight, threshold, grad_scale, out_dtype=out_dtype)


def recompute(
    way: calls.Way,
    weight: Tensor,
    threshold: Tensor,
    grad_scale: Tensor | None,
    power: float,
    dtype: torch.dtype | None,
    grad: Tensor,
) -> Tensor:
    """P(w) for a backward pass that has received ``grad``: differentiable where its result must be."""
    if torch.is_grad_enabled():
        return _threshold(weight, threshold, grad_scale, power, dtype)
    return way.threshold_recompute(weight, threshold, power, grad, out_dtype=dtype)


def scale_weight_grad(
    way: calls.Way, grad: Tensor, weight: Tensor, threshold: Tensor, grad_scale: Tensor | None
) -> Tensor:
    """A fresh weight gradient, scaled and in the weight's dtype; in place where neither forbids it."""
    if grad_scale is None:
        return grad.to(weight.dtype)
    if torch.is_grad_enabled() or grad.dtype != weight.dtype:
        return scale_pruned_grad(way, grad, weight, threshold, grad_scale, weight.dtype)
    way.scale_fresh_grad_(grad, weight, threshold, grad_scale)
    return grad


threshold = _threshold = eager_form(Threshold)
_scale_pruned_grad = eager_form(ScalePrunedGrad)
