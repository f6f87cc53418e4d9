"""Feather as the paper's published code computes it: what this package is compared with.

Written from the method's description: the sort of all weights in one buffer at every step, a forward of eleven
elementwise kernels, and a float32 mask that lives until backward. Its known faults (cancellation near T, the host read)
belong to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def magnitude_threshold(weights: Sequence[Tensor], sparsity: float) -> float:
    """The ``sparsity`` quantile of abs(w), linearly interpolated: copy into one buffer, sort, read on the host."""
    magnitudes = torch.zeros(sum(weight.numel() for weight in weights)).to(weights[0].device)
    begin = 0
    for weight in weights:
        magnitudes[begin : begin + weight.numel()] = weight.detach().abs().reshape(-1)
        begin += weight.numel()
    ascending, _ = torch.sort(magnitudes)
    position = (ascending.numel() - 1) * sparsity
    low, high = ascending[math.floor(position)], ascending[math.ceil(position)]
    return float((low + (high - low) * (position - math.floor(position))).item())


def threshold(weight: Tensor, t: Tensor | float, power: float) -> tuple[Tensor, Tensor]:
    """``sign(w) (abs(w)^p - T^p)^(1/p)`` where that difference is positive, else 0; and the mask ``abs(w) > T``."""
    magnitude = weight.abs()
    difference = magnitude.pow(power) - t**power
    root = (difference * (difference > 0).float()).pow(1 / power)
    return root * weight.sign(), (magnitude > t).float()


def scale_gradient(gradient: Tensor, mask: Tensor, grad_scale: float) -> Tensor:
    """``g * (1 where the mask is 1, grad_scale where it is 0)``."""
    return gradient * (mask * (1 - grad_scale) + grad_scale)


class GlobalThreshold:
    """T, shared by the layers of a model."""

    value = 0.0


class PaperFunction(torch.autograd.Function):
    """The formula with its mask, saved for backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, t: float, power: float, grad_scale: float) -> Tensor:
        """P(w)."""
        value, mask = threshold(weight, t, power)
        ctx.save_for_backward(mask)
        ctx.grad_scale = grad_scale
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        """The gradient, scaled by the mask."""
        return scale_gradient(gradient, ctx.saved_tensors[0], ctx.grad_scale), None, None, None


class PaperConv2d(nn.Conv2d):
    """A convolution with P(weight)."""

    paper: Callable[[Tensor], Tensor]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name for it)
        """As ``nn.Conv2d``."""
        return self._conv_forward(input, self.paper(self.weight), self.bias)


class PaperLinear(nn.Linear):
    """A linear layer with P(weight)."""

    paper: Callable[[Tensor], Tensor]

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name for it)
        """As ``nn.Linear``."""
        return F.linear(input, self.paper(self.weight), self.bias)


def make_sparse(model: nn.Module, power: float, grad_scale: float) -> GlobalThreshold:
    """Make convolutions and linear layers use the formula; the threshold that is returned is still to be set."""
    shared = GlobalThreshold()

    def thresholded(weight: Tensor) -> Tensor:
        return PaperFunction.apply(weight, shared.value, power, grad_scale)

    layers: list[Any] = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    for layer in layers:
        layer.__class__ = PaperConv2d if isinstance(layer, nn.Conv2d) else PaperLinear
        layer.paper = thresholded
    return shared
