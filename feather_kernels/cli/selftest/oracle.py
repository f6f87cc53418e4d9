"""Exact values for ``selftest``: the thresholding operator in decimal arithmetic, and errors in units of last place.

Shares no code with the kernels.
"""

from __future__ import annotations

import math
from decimal import Context, Decimal, localcontext

import torch
from torch import Tensor

DIGITS = Context(prec=60)
MANTISSA_BITS = {torch.float16: 10, torch.bfloat16: 7, torch.float32: 23, torch.float64: 52}
_INTEGER = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def boundary_weights(t: Tensor, dtype: torch.dtype) -> Tensor:
    """Weights at T and next to it, spread over the binades above it, and special ones; of both signs."""
    at = (t if bool(t > 0) else torch.tensor(0.3, dtype=torch.float32, device="cpu")).to(dtype)
    integer = _INTEGER[dtype.itemsize]
    neighbours = (at.view(integer) + torch.arange(-4, 24, dtype=integer, device="cpu")).view(dtype)
    spread = at.double() * torch.exp2(torch.linspace(-2, 30, 80, dtype=torch.float64, device="cpu"))
    info = torch.finfo(dtype)
    values = [0.0, info.smallest_normal, 1.0, info.max, math.inf, math.nan]
    special = torch.tensor(values, dtype=torch.float64, device="cpu")
    weights = torch.cat([neighbours, spread.to(dtype), special.to(dtype)])
    return torch.cat([weights, -weights])


def pruned(weights: Tensor, t: Tensor) -> Tensor:
    """T > 0 and abs(w) <= T, in float64."""
    return (t > 0) & (weights.double().abs() <= t.double())


def threshold(weights: Tensor, t: Tensor, power: float) -> tuple[Tensor, Tensor]:
    """``sign(w) (abs(w)^p - T^p)^(1/p)`` where kept, 0 where pruned, T > 0; as two float64 whose sum it is."""
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
    """Largest error in units of the last place of the wanted value; infinite where NaN or infinities do not match."""
    leading, rest = wanted
    rounded = leading.to(result.dtype)
    if not bool(same(result, rounded)[~rounded.isfinite()].all()):
        return math.inf
    if bool((result.signbit() != leading.signbit())[leading == 0].any()):
        return math.inf  # a pruned output is +0.0
    finite = rounded.isfinite()
    error = ((result.double() - leading) - rest)[finite].abs()
    exponent = torch.frexp(leading[finite]).exponent - 1
    lowest = math.frexp(torch.finfo(result.dtype).smallest_normal)[1] - 1
    ulp = torch.exp2((exponent.clamp_min(lowest) - MANTISSA_BITS[result.dtype]).double())
    worst = (error / ulp).max()
    return math.inf if bool(worst.isnan()) else float(worst)


def same(a: Tensor, b: Tensor) -> Tensor:
    """Elementwise: the same bits, every NaN taken as one."""
    integer = _INTEGER[a.dtype.itemsize]
    return (a.view(integer) == b.view(integer)) | (a.isnan() & b.isnan())
