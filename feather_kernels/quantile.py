"""Quantiles of magnitudes: the rank that a sparsity asks for, and the threshold between two order statistics."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def quantile_position(count: int, sparsity: float) -> tuple[int, float]:
    """Split the position ``m = (count - 1) sparsity``, computed in float64, into its rank and the fraction above it.

    Args:
        count: number of weights, at least 1.
        sparsity: in [0, 1).

    Returns:
        floor(m) and m - floor(m).
    """
    position = (count - 1) * sparsity
    rank = math.floor(position)
    return rank, position - rank


def interpolate(values: Tensor, fraction: Tensor | float) -> Tensor:
    """Interpolate between the neighbouring order statistics ``v0 <= v1`` without ever reaching the second.

    The result is v0 where the fraction is 0, where v1 is not greater than v0 (ties, NaN), and where rounding (or an
    infinite v1) would give v1 or more.

    Args:
        values: (..., 2), v0 and v1.
        fraction: a number in [0, 1), or a tensor (...) in the values' dtype.

    Returns:
        The threshold, (...).
    """
    low, high = values.unbind(-1)
    value = low + (high - low) * fraction
    return torch.where(value < high, value, low)  # false for NaN, and for ties, where the value is v0
