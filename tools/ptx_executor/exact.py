"""The oracle of the executor's tests: rounding of exact rationals to binary formats, one number at a time."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np

from tools.ptx_executor.scalar_types import Array, bf16_to_f32

FORMATS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127), "f64": (53, -1022, 1023)}


def round_fraction(value: Fraction, type_name: str, mode: str = "rn") -> float:
    """``value`` in the format (precision, smallest and largest exponent) by definition; zero comes out as +0."""
    precision, smallest, largest = FORMATS[type_name]
    magnitude = abs(value)
    if magnitude == 0:
        return 0.0
    exponent = magnitude.numerator.bit_length() - magnitude.denominator.bit_length()
    exponent -= magnitude < Fraction(2) ** exponent
    unit = Fraction(2) ** (max(exponent, smallest) - precision + 1)
    steps, rest = divmod(magnitude, unit)
    up = {
        "rn": rest * 2 > unit or (rest * 2 == unit and steps % 2 == 1),
        "rz": False,
        "rm": rest > 0 and value < 0,
        "rp": rest > 0 and value > 0,
    }[mode]
    rounded = (steps + up) * unit
    top = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** largest
    if rounded > top:
        to_infinity = mode == "rn" or (mode == "rm" and value < 0) or (mode == "rp" and value > 0)
        return math.copysign(math.inf if to_infinity else float(top), 1 if value > 0 else -1)
    return float(rounded) if value > 0 else -float(rounded)


def as_floats(values: Array, type_name: str) -> list[float]:
    """An array of the format (bf16 as its bits) as Python floats."""
    return [float(v) for v in (bf16_to_f32(values) if type_name == "bf16" else values)]


def edge_floats(type_name: str, count: int, seed: int) -> Array:
    """Random bit patterns and every special one: zeros, subnormals, largest, infinities, NaN, ties."""
    rng = np.random.default_rng(seed)
    precision, smallest, largest = FORMATS[type_name]
    tiny, top = 2.0**smallest, (2 - 2.0 ** (1 - precision)) * 2.0**largest
    step = 2.0 ** (1 - precision)
    special = [0.0, tiny, tiny / 2, tiny * step, top, math.inf, 1.0, 1 + step, 0.5, 1.5, 2.5]
    special += [-s for s in special] + [math.nan]
    width = {"f16": 16, "bf16": 16, "f32": 32, "f64": 64}[type_name]
    unsigned = {16: np.uint16, 32: np.uint32, 64: np.uint64}[width]
    random = rng.integers(0, 2**width, count // 2, dtype=unsigned)
    chosen = np.array(special)[rng.integers(0, len(special), count // 4)]
    near = rng.normal(size=count - count // 2 - count // 4)
    floats = np.concatenate([chosen, near])
    if type_name == "bf16":
        return np.concatenate([random, (floats.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)])
    dtype = {"f16": np.float16, "f32": np.float32, "f64": np.float64}[type_name]
    with np.errstate(over="ignore"):
        return np.concatenate([random.view(dtype), floats.astype(dtype)])
