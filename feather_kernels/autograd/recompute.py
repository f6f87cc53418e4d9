"""What the recomputing layers share: when they run, and how backward computes P(w) again."""

from __future__ import annotations

import torch
from torch import Tensor

from feather_kernels.autograd.threshold import SparseWeight, ops, scale_pruned_grad, threshold
from feather_kernels.torch_private import forward_mode_active, tracing, transforms_active


def may_recompute(x: Tensor) -> bool:
    """Return whether backward may recompute P(w): grad mode is on, and nothing active needs torch's own op on x."""
    seen = transforms_active() or forward_mode_active() or tracing()
    return torch.is_grad_enabled() and not seen and not x.is_nested and x.layout == torch.strided


def recompute(sparse: SparseWeight, grad: Tensor) -> Tensor:
    """Return P(w) for a backward pass that received ``grad``; differentiable if the result of backward must be."""
    if torch.is_grad_enabled():
        return threshold(*sparse)
    return ops.threshold_recompute.default(sparse.weight, sparse.t, sparse.power, grad, out_dtype=sparse.dtype)


def weight_gradient(grad: Tensor, sparse: SparseWeight) -> Tensor:
    """Return the scaled gradient of the weight, in its dtype, given that of P(w)."""
    if sparse.grad_scale is None:
        return grad.to(sparse.weight.dtype)
    return scale_pruned_grad(grad, sparse.weight, sparse.t, sparse.grad_scale)


def autocast_dtype(weight: Tensor) -> torch.dtype | None:
    """Return the dtype to which autocast casts the operands of a layer with this weight; None if it does not cast."""
    device = weight.device.type
    if device == "meta" or not torch.is_autocast_enabled(device) or weight.dtype == torch.float64:
        return None
    return torch.get_autocast_dtype(device)


def cast_like_autocast(x: Tensor, bias: Tensor | None, dtype: torch.dtype | None) -> tuple[Tensor, Tensor | None]:
    """Cast the input and the bias as autocast does: to ``dtype``, unless that is None; float64 and integers stay."""
    if dtype is None:
        return x, bias
    if x.is_floating_point() and x.dtype != torch.float64:
        x = x.to(dtype)
    return x, None if bias is None else bias.to(dtype)
