"""The oracle of ``selftest``: the thresholding operator in decimal arithmetic, and errors in ulps.

It shares no formula with the kernels and the reference, so that no fault can hide in both.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal, localcontext

import torch
from torch import Tensor

from feather_kernels.dtypes import BITS_DTYPE

DIGITS = Context(prec=60)


def boundary_weights(
    t: Tensor, dtype: torch.dtype, neighbours: tuple[int, int] = (4, 24), count: int = 40, seed: int = 0
) -> Tensor:
    """Weights of both signs at T and next to it, near it and far beyond it, and every special value of the dtype.

    Args:
        t: T, 0-dim; 0.3 takes the place of a T that is not a positive finite number.
        dtype: of the weights.
        neighbours: how many of the representable numbers below T, and from T upwards.
        count: random weights up to half as much again as T, and as many from T / 64 to 2^40 T, evenly by exponent.
        seed: of the random weights.
    """
    generator = torch.Generator().manual_seed(seed)

    def uniform() -> Tensor:
        return torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")

    usable = bool(t.isfinite()) and bool(t > 0)
    center = t.detach().cpu() if usable else torch.tensor(0.3, dtype=t.dtype, device="cpu")
    integer, info = BITS_DTYPE[dtype], torch.finfo(dtype)
    offsets = torch.arange(-neighbours[0], neighbours[1], device="cpu").to(integer)
    next_to = (center.to(dtype).view(integer) + offsets).view(dtype)
    low = max(math.log2(float(center)) - 6, math.log2(info.smallest_normal))
    high = min(math.log2(float(center)) + 40, math.log2(info.max))
    spread = torch.exp2(uniform() * max(high - low, 1.0) + low).to(dtype)
    near = (center.double() * (1 + uniform() * 0.5)).to(dtype)
    smallest = info.smallest_normal * info.eps
    values = [0.0, smallest, smallest * 3, info.smallest_normal, 1.0, info.max, math.inf, math.nan]
    special = torch.tensor(values, dtype=torch.float64, device="cpu").to(dtype)
    weights = torch.cat([next_to, spread, near, special])
    return torch.cat([weights, -weights])


def pruned(weights: Tensor, t: Tensor) -> Tensor:
    """Whether each weight is pruned: T > 0 and abs(w) <= T, compared in float64."""
    return (t > 0) & (weights.double().abs() <= t.double())


def threshold(weights: Tensor, t: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """``sign(w) (abs(w)^p - T^p)^(1/p)`` where the weight is kept and 0 where it is pruned.

    Args:
        weights: of any floating-point dtype.
        t: T, 0-dim and positive.
        power: p, at least 1 or inf.

    Returns:
        Two float64 tensors, whose sum is the exact value.
    """
    with localcontext(DIGITS):
        values = [_threshold_of(float(w), float(t), power) for w in weights.double()]
        leading = torch.tensor([float(value) for value in values], dtype=torch.float64, device="cpu")
        rest = [float(value - Decimal(float(value))) if value.is_finite() else 0.0 for value in values]
    overflow = leading.isinf() & weights.isfinite()
    return leading, torch.tensor(rest, dtype=torch.float64, device="cpu").masked_fill(overflow, 0.0)


def _threshold_of(weight: float, t: float, power: float) -> Decimal:
    w, limit = Decimal(weight), Decimal(t)
    a = w.copy_abs()  # abs() would round to the digits of the context
    if not w.is_finite():
        return w
    if a <= limit:
        return Decimal(0)
    if math.isinf(power):
        return w
    p = Decimal(power)
    return ((a**p - limit**p) ** (1 / p)).copy_sign(w)


def ulp_error(result: Tensor, wanted: tuple[Tensor, Tensor]) -> float:
    """The largest error in ulps of the wanted value; inf if NaNs, infinities or the sign of a zero do not match."""
    leading, rest = wanted
    rounded = leading.to(result.dtype)
    if not bool(same(result, rounded)[~rounded.isfinite()].all()):
        return math.inf
    if bool((result.signbit() != leading.signbit())[leading == 0].any()):
        return math.inf  # a pruned output is +0.0
    finite = rounded.isfinite()
    error = ((result.double() - leading) - rest)[finite].abs()
    worst = (error / ulp(leading[finite], result.dtype)).max()
    return math.inf if bool(worst.isnan()) else float(worst)


def ulp(values: Tensor, dtype: torch.dtype) -> Tensor:
    """The ulp of ``dtype`` at each value, in float64: the distance between its neighbouring numbers there."""
    info = torch.finfo(dtype)
    lowest = math.frexp(info.smallest_normal)[1]
    exponent = torch.frexp(values).exponent.clamp_min(lowest) - 1
    return torch.exp2(exponent.double()) * info.eps


def same(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise, whether the bits are the same; all NaNs count as the same."""
    integer = BITS_DTYPE[a.dtype]
    return (a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())
