"""Sparse layers: the dense layer's class swapped for one whose forward reads P(weight).

The module object, its Parameters, state_dict keys, hooks and ``isinstance`` relations stay as they were; the weight
stays the dense, latent one that the optimizer updates. ``make_sparse`` and ``make_dense`` swap there and back.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feather_kernels import autograd
from feather_kernels.nn.thresholds import LayerThreshold

__all__ = ["FeatherConv2d", "FeatherLinear", "SparseLayer", "make_dense", "make_sparse", "sparse_class"]


class SparseLayer(nn.Module):
    """Mixin of every sparse layer: the thresholded weight, and a threshold that moves with the module."""

    weight: Tensor
    feather: LayerThreshold

    def sparse_weight(self) -> Tensor:
        """P(weight), differentiable: Feather's thresholding operator with the scaled straight-through gradient."""
        feather = self.feather
        return autograd.threshold(self.weight, feather.threshold, feather.grad_scale, feather.power, None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.feather.follow(self.weight)  # which torch.load may have put on another device

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self.feather.follow(self.weight)
        return self


class FeatherLinear(SparseLayer, nn.Linear):
    """``torch.nn.Linear`` that computes ``x P(weight)^T + bias``."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name for it)
        """(*, in_features) -> (*, out_features)."""
        return F.linear(input, self.sparse_weight(), self.bias)


class FeatherConv2d(SparseLayer, nn.Conv2d):
    """``torch.nn.Conv2d`` with P(weight); every argument (groups, dilation, padding_mode) as in the dense layer."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name for it)
        """(N, C_in, H, W) or (C_in, H, W) -> (N, C_out, H_out, W_out) or (C_out, H_out, W_out)."""
        return self._conv_forward(input, self.sparse_weight(), self.bias)


_SPARSE: dict[type[nn.Module], type[SparseLayer]] = {nn.Linear: FeatherLinear, nn.Conv2d: FeatherConv2d}
_DENSE: dict[type, type[nn.Module]] = {sparse: dense for dense, sparse in _SPARSE.items()}


def sparse_class(module: nn.Module) -> type[SparseLayer] | None:
    """The sparse class for exactly the module's class, or None."""
    return _SPARSE.get(type(module))


def make_sparse(module: nn.Module, threshold: LayerThreshold) -> None:
    """Swap a dense layer's class for its sparse one, reading ``threshold``."""
    cls: Any = sparse_class(module)
    if cls is None:
        raise TypeError(f"module must be one of {[c.__name__ for c in _SPARSE]}, got {type(module).__name__}")
    module.__class__ = cls
    module.__dict__["feather"] = threshold  # not a parameter, buffer or submodule


def make_dense(module: SparseLayer) -> None:
    """Undo ``make_sparse``; the weight is left as it is."""
    del module.feather
    module.__class__ = _DENSE[type(module)]  # type: ignore[assignment]


def finalize_weight(module: SparseLayer) -> None:
    """Write P(weight) into the weight, in place."""
    feather = module.feather
    with torch.no_grad():
        weight = module.weight
        torch.ops.feather_kernels.threshold.out(weight, feather.threshold, feather.power, out=weight)
