"""What the lean forms of the layers share: when they run, and P(w) computed again in backward."""

from __future__ import annotations

import torch
from torch import Tensor

from feather_kernels.autograd.threshold import ops, scale_pruned_grad, threshold
from feather_kernels.torch_private import forward_mode_active, tracing, transforms_active


def runs_lean() -> bool:
    """Whether a lean form runs: grad mode is on, and nothing is active that must see torch's own op."""
    return torch.is_grad_enabled() and not transforms_active() and not forward_mode_active() and not tracing()


def recompute(
    weight: Tensor, t: Tensor, grad_scale: Tensor | None, power: float, dtype: torch.dtype | None, grad: Tensor
) -> Tensor:
    """P(w) for a backward pass that has received ``grad``: differentiable where its result must be."""
    if torch.is_grad_enabled():
        return threshold(weight, t, grad_scale, power, dtype)
    return ops.threshold_recompute.default(weight, t, power, grad, out_dtype=dtype)


def weight_gradient(grad: Tensor, weight: Tensor, t: Tensor, grad_scale: Tensor | None) -> Tensor:
    """The gradient of the weight, given that of P(w): scaled, in the weight's dtype."""
    return grad.to(weight.dtype) if grad_scale is None else scale_pruned_grad(grad, weight, t, grad_scale)


def cast_like_autocast(x: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """Input and bias as autocast casts them: to ``dtype``, unless that is None; float64 and integers stay."""
    if dtype is None:
        return x, bias
    if x.is_floating_point() and x.dtype != torch.float64:
        x = x.to(dtype)
    return x, None if bias is None else bias.to(dtype)
