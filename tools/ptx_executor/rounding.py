"""Correctly rounded arithmetic that numpy lacks: fused multiply-add and the directed rounding modes.

An exact result is first brought to float64 (or float32) with *round to odd*: truncate, then set the last bit when
anything was lost. Rounding that once more to a format with at least two bits fewer is exact in every mode
(S. Boldo, G. Melquiond, "Emulation of a FMA and correctly rounded sums", IEEE Trans. Computers 2008).
"""

from __future__ import annotations

import ctypes
import ctypes.util

import numpy as np

from tools.ptx_executor.scalar_types import UNSIGNED, Array, f32_to_bf16

MODES = ("rn", "rz", "rm", "rp")
_SPLITTER = 2.0**27 + 1


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """float64 a + b and its rounding error (Knuth)."""
    total = a + b
    shadow = total - a
    return total, (a - (total - shadow)) + (b - shadow)


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """float64 a * b and its rounding error (Dekker, Veltkamp)."""
    product = a * b
    a_high = a * _SPLITTER - (a * _SPLITTER - a)
    b_high = b * _SPLITTER - (b * _SPLITTER - b)
    a_low, b_low = a - a_high, b - b_high
    return product, a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low)


def to_odd(nearest: Array, error: Array) -> Array:
    """The float64 sum ``nearest + error`` rounded to odd, where ``nearest`` is that sum to nearest."""
    raw = nearest.view(np.int64)
    inexact = np.isfinite(nearest) & np.isfinite(error) & (error != 0) & ((raw & 1) == 0)
    away = (error > 0) == (nearest > 0)
    return np.where(inexact, np.where(away, raw + 1, raw - 1), raw).view(np.float64)


def add_odd(a: Array, b: Array) -> Array:
    """A + b in float64, rounded to odd."""
    return to_odd(*two_sum(a.astype(np.float64), b.astype(np.float64)))


def round_to(exact: Array, dtype: type, mode: str = "rn") -> Array:
    """Floats or integers to ``dtype`` in one of :data:`MODES`; ``exact`` may be float64 rounded to odd."""
    with np.errstate(all="ignore"):
        nearest: Array = exact.astype(dtype)
    if mode == "rn":
        return nearest
    wide, source = nearest.astype(np.longdouble), exact.astype(np.longdouble)
    raw: Array = nearest.view(UNSIGNED[nearest.dtype.itemsize * 8])
    one = raw.dtype.type(1)
    too_far, too_near = np.abs(wide) > np.abs(source), np.abs(wide) < np.abs(source)
    grow = {"rz": np.zeros_like(too_far), "rm": source < 0, "rp": source > 0}[mode]
    raw = np.where(too_far & ~grow, raw - one, np.where(too_near & grow, raw + one, raw))
    zero = (nearest == 0) & too_near & grow & (source < 0)
    sign = raw.dtype.type(1 << (nearest.dtype.itemsize * 8 - 1))
    return np.where(zero, raw | sign, raw).astype(raw.dtype).view(dtype)


def round_to_bf16(exact: Array, mode: str = "rn") -> Array:
    """Floats or integers to bfloat16 bits, through float32 rounded to odd."""
    f32 = round_to(exact, np.float32, "rz")
    raw = f32.view(np.uint32)
    lost = (f32.astype(np.longdouble) != exact.astype(np.longdouble)) & np.isfinite(f32) & ~np.isnan(exact)
    raw = np.where(lost, raw | np.uint32(1), raw).astype(np.uint32)
    if mode == "rn":
        return f32_to_bf16(raw.view(np.float32))
    negative = (raw >> np.uint32(31)).astype(bool)
    up = ((raw & np.uint32(0xFFFF)) != 0) & {"rz": np.zeros_like(negative), "rm": negative, "rp": ~negative}[mode]
    bf16 = (raw >> np.uint32(16)).astype(np.uint16) + up.astype(np.uint16)
    return np.where(np.isnan(exact), np.uint16(0x7FFF), bf16)


def fma_odd(a: Array, b: Array, c: Array) -> Array:
    """A * b + c of float16 or float32 values (the product is exact in float64), rounded to odd in float64."""
    return add_odd(a.astype(np.float64) * b.astype(np.float64), c.astype(np.float64))


def fma_f64(a: Array, b: Array, c: Array) -> Array:
    """A * b + c in float64 with one rounding; extreme exponents go through the C library, one by one."""
    a, b, c = np.broadcast_arrays(a, b, c)
    # numpy's own operations round once where nothing is added, or where the product is zero or not finite
    plain = (a == 0) | (b == 0) | ~np.isfinite(a) | ~np.isfinite(b)
    in_one_step = np.where(plain, a * b + c, np.where(c == 0, a * b, c))
    plain |= (c == 0) | ~np.isfinite(c)
    high, low = two_product(a, b)
    upper, upper_error = two_sum(c, low)
    total, total_error = two_sum(high, upper)
    result = total + to_odd(*two_sum(upper_error, total_error))
    safe = np.ones(a.shape, bool)
    for value in (a, b, c, high):
        magnitude = np.abs(value)
        safe &= (magnitude > 2.0**-400) & (magnitude < 2.0**400)
    for i in np.nonzero(~safe & ~plain)[0]:
        result[i] = _libm_fma(float(a[i]), float(b[i]), float(c[i]))
    return np.where(plain, in_one_step, result)


def _load_fma() -> ctypes._NamedFuncPointer:
    function = ctypes.CDLL(ctypes.util.find_library("m")).fma
    function.restype, function.argtypes = ctypes.c_double, [ctypes.c_double] * 3
    return function


_libm_fma = _load_fma()
