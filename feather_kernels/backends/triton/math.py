"""Formulas as load-free jit functions: values in, values out.

Weights come in the compute dtype (float32, or float64 for float64 weights). Sources and bounds:
docs/design/numerics.md; the same formulas stand in ``backends/reference.py``.
"""

from typing import Any

import triton
import triton.language as tl

COMPILE: dict[str, Any] = {"enable_fp_fusion": True}
"""Options of every launch: the bounds hold with a * b + c fused, which triton 3.10 leaves off unless asked."""


@triton.jit
def is_pruned(w, t):
    """The one predicate of the package: T > 0 and abs(w) <= T."""
    return tl.abs(w) <= tl.where(t > 0, t, -1.0)  # a NaN T compares false, as every bound below 0 does


@triton.jit
def threshold_value(w, t, P: tl.constexpr, WIDE: tl.constexpr):
    """P(w) = sign(w) (abs(w)^P - T^P)^(1/P) where kept, +0.0 where pruned; T <= 0 is the identity.

    w: any shape, t: scalar, both float32, or float64 where WIDE. P: 1, 2, 3, or inf as 0.
    """
    if P == 0:
        y = w
    elif P == 1:
        y = tl.abs(w) - t
        y = tl.where(w < 0, -y, y)
    else:
        y = root_of_difference(w, t, P, WIDE)
    y = tl.where(t != t, t, y)
    y = tl.where(is_pruned(w, t), 0.0, y)
    return tl.where(t <= 0, w, y)


@triton.jit
def root_of_difference(w, t, P: tl.constexpr, WIDE: tl.constexpr):
    """sign(w) (a^P - T^P)^(1/P) for P = 2, 3: scaled so that T is in [1, 2), factored, without a division.

    Beyond ``far`` (of the scaled weight) the result is w itself; the result never exceeds w.
    """
    if WIDE:
        exponent = (t.to(tl.int64, bitcast=True) >> 52) & 2047
        exponent = tl.minimum(tl.maximum(2046 - exponent, 1), 2045)
        scale = (exponent << 52).to(tl.float64, bitcast=True)
        unscale = ((2046 - exponent) << 52).to(tl.float64, bitcast=True)
    else:
        exponent = (t.to(tl.int32, bitcast=True) >> 23) & 255
        exponent = tl.minimum(tl.maximum(254 - exponent, 1), 253)
        scale = (exponent << 23).to(tl.float32, bitcast=True)
        unscale = ((254 - exponent) << 23).to(tl.float32, bitcast=True)
    if WIDE:
        far = 268435456.0 if P == 2 else 524288.0  # 2^28, 2^19
    else:
        far = 16384.0 if P == 2 else 1024.0  # 2^14, 2^10
    a = tl.abs(w)
    x = a * scale
    ts = t * scale
    if P == 2:
        z = (x - ts) * (x + ts)
    else:
        z = (x - ts) * (x * (x + ts) + ts * ts)
    z = tl.where((x <= ts) | (x > far), 1.0, z)
    y = square_root(z, WIDE) if P == 2 else cube_root(z, WIDE)
    y = tl.minimum(y * unscale, a)
    y = tl.where(w < 0, -y, y)
    y = tl.where(w != w, w, y)  # tl.minimum drops NaN
    return tl.where(x > far, w, y)


@triton.jit
def square_root(z, WIDE: tl.constexpr):
    """z^(1/2) for normal z: an approximate inverse root with one correction; exact rounding in float64."""
    if WIDE:
        return tl.sqrt(z)
    t = tl.rsqrt(z)
    y = z * t
    return y + (z - y * y) * (0.5 * t)


@triton.jit
def cube_root(z, WIDE: tl.constexpr):
    """z^(1/3) for normal z in float32's range, float64 from 2^-180 to 2^57, by third-order steps without a division.

    A seed from the bits; t ~ z^(-1/3) by t += t e (1/3 + 2/9 e), e = 1 - z t^3; then y = z t^2 with the same step.
    """
    narrow = (z * 1152921504606846976.0 if WIDE else z).to(tl.float32)  # 2^60: z is small under a denormal T
    third = tl.umulhi(narrow.to(tl.uint32, bitcast=True), 0x55555556).to(tl.int32)
    t = (0x54A21D2A - third).to(tl.float32, bitcast=True)
    error = 1.0 - narrow * t * t * t
    t += t * error * (0.33333334 + 0.22222222 * error)
    if WIDE:
        t = t.to(tl.float64) * 1048576.0
        error = 1.0 - z * t * t * t
        t += t * error * (1.0 / 3.0 + 2.0 / 9.0 * error)
        u = t * t
        y = z * u
        step = (z - y * y * y) * u
        return y + step * (1.0 / 3.0 + 2.0 / 9.0 * (step * t))
    u = t * t
    y = z * u
    step = (z - y * y * y) * u
    return y + step * (0.33333334 + 0.22222222 * (step * t))


@triton.jit
def general_power(w, t, p, rest, inverse):
    """W (1 - (T/a)^p)^(1/p) in float64, by Kahan's log1p and expm1.

    w and t in float64; p > 1, ``rest`` = p less its 24 leading bits, and ``inverse`` = 1/p as float64 scalars.
    """
    a = tl.abs(w)
    relative = tl.where(a > t, (a - t) / a, 0.5)
    root = inverse_power(-expm1(p * log1p(-relative)), p, rest, inverse)
    y = tl.where(a == float("inf"), w, w * tl.minimum(root, 1.0))
    y = tl.where(w != w, w, y)
    y = tl.where(t != t, t, y)
    y = tl.where(is_pruned(w, t), 0.0, y)
    return tl.where(t <= 0, w, y)


@triton.jit
def inverse_power(z, p, rest, inverse):
    """z^(1/p) for normal z <= 1, float64: z = m 2^k, k = n p + r exactly, so the exponential's argument is below 1."""
    bits = z.to(tl.int64, bitcast=True)
    k = ((bits >> 52) - 1022).to(tl.float64)
    m = ((bits & 0xFFFFFFFFFFFFF) | 0x3FE0000000000000).to(tl.float64, bitcast=True)
    n = tl.floor(k * inverse + 0.5)
    fraction = (k - n * (p - rest) - n * rest) * inverse
    scale = ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    return tl.exp(fraction * 0.6931471805599453 + tl.log(m) * inverse) * scale


@triton.jit
def log1p(x):
    """log(1 + x) for x > -1, float64 (Kahan; Goldberg 1991, theorem 4)."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def expm1(v):
    """exp(v) - 1 for v <= 0, float64 (Kahan)."""
    u = tl.exp(v)
    return tl.where(u == 1.0, v, tl.where(u == 0.0, -1.0, (u - 1.0) * (v / tl.where(u == 1.0, 1.0, tl.log(u)))))
