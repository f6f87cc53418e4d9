"""The formulas as jit functions that take and return values, and load nothing.

Weights come in the compute dtype (float32, or float64 for float64 weights). ``docs/design/numerics.md`` has sources and
error bounds; ``backends/reference.py`` has the same formulas in PyTorch.
"""

import triton
import triton.language as tl


@triton.jit
def is_pruned(w, t):
    """The one predicate of the package: T > 0 and abs(w) <= T."""
    return tl.abs(w) <= tl.where(t > 0, t, -1.0)  # a NaN T compares false, as every bound below 0 does


@triton.jit
def bits_of(x):
    """The bits of a float32 or float64 as an unsigned integer."""
    return x.to(tl.uint64 if x.dtype == tl.float64 else tl.uint32, bitcast=True)


@triton.jit
def threshold_value(w, t, P: tl.constexpr):
    """P(w) = sign(w) (abs(w)^P - T^P)^(1/P) where kept, +0.0 where pruned; T <= 0 is the identity, a NaN T gives NaN.

    w: any shape, t: scalar of its dtype, float32 or float64. P: 1, 2, 3, or inf as 0.
    """
    if P == 0:
        y = w
    else:
        a = tl.abs(w)
        magnitude = a - t if P == 1 else root_of_difference(a, t, P)
        sign = bits_of(w) ^ bits_of(a)
        y = (bits_of(magnitude) | sign).to(w.dtype, bitcast=True)
    return where_kept(y, w, t)


@triton.jit
def where_kept(y, w, t):
    """P(w), given its values y where w is kept: +0.0 where w is pruned, w for T <= 0, NaN for a NaN T."""
    y = tl.where(is_pruned(w, t), 0.0, y)
    y = tl.where(t != t, t, y)
    return tl.where(t <= 0, w, y)


@triton.jit
def root_of_difference(a, t, P: tl.constexpr):
    """(a^P - T^P)^(1/P) for P = 2, 3 and a > T > 0: scaled so that T is in [1, 2), factored, without a division.

    The result is at most a, as bits: a root that is infinite or NaN because z overflowed counts as larger too, and P(w)
    rounds to w there. Where a <= T, z may be 0 or negative and the result has no meaning.
    """
    scale, unscale = scales_of(t)
    x = a * scale
    ts = t * scale
    if P == 2:
        y = square_root((x - ts) * (x + ts))
    else:
        y = cube_root((x - ts) * tl.fma(x, x, tl.fma(x, ts, ts * ts)))
    y *= unscale
    if P == 3 and a.dtype == tl.float64:
        y = tl.where(x > 524288.0, a, y)  # 2^19: the start of the root is a float32's
    return tl.minimum(bits_of(y), bits_of(a)).to(a.dtype, bitcast=True)


@triton.jit
def scales_of(t):
    """Powers of two, both normal, that bring T into [1, 2) and back, or close to it for the extreme exponents."""
    if t.dtype == tl.float64:
        exponent = (t.to(tl.int64, bitcast=True) >> 52) & 2047
        exponent = tl.minimum(tl.maximum(2046 - exponent, 1), 2045)
        scale, unscale = exponent << 52, (2046 - exponent) << 52
    else:
        exponent = (t.to(tl.int32, bitcast=True) >> 23) & 255
        exponent = tl.minimum(tl.maximum(254 - exponent, 1), 253)
        scale, unscale = exponent << 23, (254 - exponent) << 23
    return scale.to(t.dtype, bitcast=True), unscale.to(t.dtype, bitcast=True)


@triton.jit
def square_root(z):
    """z^(1/2) for normal z: an approximate inverse root with one correction; exact rounding in float64."""
    if z.dtype == tl.float64:
        return tl.sqrt(z)
    t = tl.rsqrt(z)
    y = z * t
    return y + (z - y * y) * (0.5 * t)


@triton.jit
def cube_root(z):
    """z^(1/3) for normal z in float32's range, float64 from 2^-180 to 2^57, without a division.

    t ~ z^(-1/3), a seed from the bits so that d = 1 - z t^3 is in [-0.077, 0.12]. In float32 y = z t^2 and
    z^(1/3) = y (1 - d)^(-2/3) = y (1 + d q(d)), q minimax of degree 4 (relative error 1.4e-8), d from y so that its
    rounding error is corrected. In float64 two third-order steps t += t d (1/3 + 2/9 d) and one such for y.
    """
    if z.dtype == tl.float64:
        return wide_cube_root(z)
    t = inverse_cube_root_seed(z)
    y = z * (t * t)
    d = tl.fma(-y, t, 1.0)
    q = tl.fma(d, 0.48529533, 0.45537439)
    q = tl.fma(d, q, 0.4933503)
    q = tl.fma(d, q, 0.55555135)
    q = tl.fma(d, q, 0.6666674)
    return tl.fma(y * d, q, y)


@triton.jit
def inverse_cube_root_seed(z):
    """z^(-1/3) within 4.2 % for normal z > 0, float32: a third of the bits, subtracted from those of a constant."""
    third = tl.umulhi(bits_of(z), 0x55555556).to(tl.int32)
    return (0x54A08000 - third).to(tl.float32, bitcast=True)


@triton.jit
def wide_cube_root(z):
    """``cube_root`` in float64; its first step in float32, which most GPUs compute 32 or 64 times faster."""
    narrow = (z * 1152921504606846976.0).to(tl.float32)  # 2^60: z is small under a denormal T
    t = inverse_cube_root_seed(narrow)
    d = 1.0 - narrow * t * t * t
    t = (t + t * d * (0.33333334 + 0.22222222 * d)).to(tl.float64) * 1048576.0
    d = 1.0 - z * t * t * t
    t += t * d * (1.0 / 3.0 + 2.0 / 9.0 * d)
    u = t * t
    y = z * u
    step = (z - y * y * y) * u
    return y + step * (1.0 / 3.0 + 2.0 / 9.0 * (step * t))
