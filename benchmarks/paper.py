"""Feather as the paper's published code computes it: what this package is compared with.

Written from the method's description: the sort of all weights in one buffer at every step, a forward of eleven
elementwise kernels, and a float32 mask that lives until backward. Its known faults (cancellation near T, the host read)
belong to it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


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
