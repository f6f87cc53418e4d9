"""The right results, computed in numpy's long double and by sorting.

Shares no code with the package, not even its tables of dtypes, so that no fault can be in both.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # by the size of an element: for its bits


def long_double(tensor: Tensor) -> np.ndarray:
    """The exact values in long double."""
    return tensor.detach().double().cpu().numpy().astype(np.longdouble)


def pruned(weight: Tensor, threshold: Tensor) -> np.ndarray:
    """T > 0 and abs(w) <= T."""
    t = long_double(threshold)
    with np.errstate(invalid="ignore"):
        return np.logical_and(t > 0, np.abs(long_double(weight)) <= t)


def threshold(weight: Tensor, t: Tensor, p: float) -> np.ndarray:
    """P(w) in long double, from the formula of the paper in the form that does not cancel near T."""
    w, big_t = long_double(weight), long_double(t)
    if big_t <= 0:
        return w
    a = np.abs(w)
    with np.errstate(all="ignore"):
        if p == math.inf:
            y = a
        elif p == 1:
            y = a - big_t
        elif p == 3:
            y = np.cbrt(a - big_t) * np.cbrt(a * a + a * big_t + big_t * big_t)
        else:
            one = np.longdouble(1)
            y = a * np.exp(np.log(-np.expm1(np.longdouble(p) * np.log1p(-(a - big_t) / a))) / np.longdouble(p))
            y = np.where(np.isinf(a), a, y) * one
        y = np.copysign(y, w)
    y = np.where(pruned(weight, t), np.longdouble(0), y)
    return np.full_like(y, np.nan) if np.isnan(big_t) else y


def scaled_gradient(gradient: Tensor, weight: Tensor, t: Tensor, scale: float) -> np.ndarray:
    return long_double(gradient) * np.where(pruned(weight, t), np.longdouble(scale), np.longdouble(1))


def ulp_error(result: Tensor, exact: np.ndarray) -> float:
    """Largest error in units of the last place of the exact value in the result's dtype.

    NaN and infinity must match: an exact value that rounds to infinity in the result's dtype counts as infinity.
    """
    dtype = result.dtype
    y = long_double(result)
    info = torch.finfo(dtype)
    half_ulp = np.longdouble(info.max) * info.eps / 4  # of the largest number, which is nearly 2^(exponent + 1)
    exact = np.where(np.abs(exact) >= np.longdouble(info.max) + half_ulp, np.copysign(np.inf, exact), exact)
    assert np.array_equal(np.isnan(y), np.isnan(exact)), "NaN in different places"
    assert np.array_equal(np.isinf(y), np.isinf(exact)), "infinity in different places"
    finite = np.isfinite(exact)
    if not finite.any():
        return 0.0
    y, exact = y[finite], exact[finite]
    exponent = np.maximum(np.frexp(exact)[1], math.frexp(info.smallest_normal)[1]) - 1
    return float(np.max(np.abs(y - exact) / np.ldexp(np.longdouble(info.eps), exponent)))


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic on weights of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def scores(weight: Tensor, scale: float | None = None) -> Tensor:
    """abs(w), scaled, rounded in the compute dtype; flat."""
    score = weight.detach().cpu().reshape(-1).to(compute_dtype(weight.dtype)).abs()
    return score if scale is None else score * torch.tensor(scale, dtype=score.dtype)


def order_statistics(parts: list[Tensor], rank: int, caps: list[int] | None = None) -> Tensor:
    """(v[rank], v[rank + 1]) of the union of the parts, of each only its caps smallest; by sorting."""
    caps = caps or [part.numel() for part in parts]
    union = torch.cat([part.sort().values[:cap] for part, cap in zip(parts, caps, strict=True)]).sort().values
    if not 0 <= rank < union.numel():
        return union.new_full((2,), math.nan)
    return union[[rank, min(rank + 1, union.numel() - 1)]]


QUIET_NAN = {torch.float32: 0x7FC00000, torch.float64: 0x7FF8000000000000}  # the one NaN of selections


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits, every NaN taken as one."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    a, b = a.detach().cpu().contiguous(), b.detach().cpu().contiguous()
    nan_a, nan_b = a.isnan(), b.isnan()
    integer = INTEGERS[a.element_size()]
    bits_equal = torch.where(nan_a, 0, a.view(integer)).equal(torch.where(nan_b, 0, b.view(integer)))
    return bool(torch.equal(nan_a, nan_b)) and bits_equal
