"""PTX scalar types as numpy sees them; bfloat16 travels as its 16 raw bits and computes as float32."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]

UNSIGNED: dict[int, type] = {8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED: dict[int, type] = {8: np.int8, 16: np.int16, 32: np.int32, 64: np.int64}
FLOAT: dict[int, type] = {16: np.float16, 32: np.float32, 64: np.float64}

UNSIGNED_TYPES = frozenset({"u8", "u16", "u32", "u64"})
SIGNED_TYPES = frozenset({"s8", "s16", "s32", "s64"})
BIT_TYPES = frozenset({"b8", "b16", "b32", "b64"})
INTEGER_TYPES = UNSIGNED_TYPES | SIGNED_TYPES
FLOAT_TYPES = frozenset({"f16", "bf16", "f32", "f64"})
PACKED = {"f16x2": "f16", "bf16x2": "bf16", "f32x2": "f32"}
PACKED_TYPES = frozenset(PACKED)
PREDICATE = frozenset({"pred"})
ALL_TYPES = INTEGER_TYPES | BIT_TYPES | FLOAT_TYPES | PACKED_TYPES | PREDICATE

CANONICAL_NAN = {16: 0x7FFF, 32: 0x7FFFFFFF, 64: 0x7FF8000000000000}
SMALLEST_NORMAL_F32 = np.float32(2.0**-126)


@cache
def bits(type_name: str) -> int:
    """Width of a type in bits; a predicate has one.

    >>> bits("bf16x2"), bits("s64"), bits("pred")
    (32, 64, 1)
    """
    if type_name == "pred":
        return 1
    if type_name in PACKED:
        return 2 * bits(PACKED[type_name])
    return int(type_name.lstrip("bfsu"))


def as_type(raw: Array, type_name: str) -> Array:
    """Raw unsigned bits seen as signed integers or floats (bf16 and packed types stay raw)."""
    if type_name in SIGNED_TYPES:
        return raw.view(SIGNED[bits(type_name)])
    if type_name in FLOAT_TYPES and type_name != "bf16":
        return raw.view(FLOAT[bits(type_name)])
    return raw


def bf16_to_f32(raw: Array) -> Array:
    """The float32 that a bfloat16's bits stand for."""
    return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: Array) -> Array:
    """Bits of the nearest bfloat16, ties to even; NaN becomes the canonical 0x7fff."""
    raw = values.view(np.uint32)
    rounded = raw + np.uint32(0x7FFF) + ((raw >> np.uint32(16)) & np.uint32(1))
    return np.where(np.isnan(values), np.uint16(0x7FFF), (rounded >> np.uint32(16)).astype(np.uint16))


def flush_subnormals(values: Array) -> Array:
    """float32 subnormals become zeros of their sign (the modifier ``.ftz``); other types pass."""
    if values.dtype != np.float32:
        return values
    return np.where(np.abs(values) < SMALLEST_NORMAL_F32, np.copysign(np.float32(0), values), values)


def canonical_nan(values: Array) -> Array:
    """Every NaN becomes the one that PTX arithmetic produces."""
    nan = np.isnan(values)
    if not nan.any():
        return values
    width = values.dtype.itemsize * 8
    quiet = np.array([CANONICAL_NAN[width]], UNSIGNED[width]).view(values.dtype)
    return np.where(nan, quiet, values)


def split(raw: Array, type_name: str) -> list[Array]:
    """The float components of raw bits: one for a scalar type, low then high half for a packed one."""
    if type_name not in PACKED:
        return [bf16_to_f32(raw) if type_name == "bf16" else as_type(raw, type_name)]
    half = bits(type_name) // 2
    halves = [raw.astype(UNSIGNED[half]), (raw >> raw.dtype.type(half)).astype(UNSIGNED[half])]
    return [part for raw_half in halves for part in split(raw_half, PACKED[type_name])]


def join(components: list[Array], type_name: str) -> Array:
    """The raw bits of float components; the inverse of :func:`split`, rounding float32 to bfloat16."""
    if type_name not in PACKED:
        return f32_to_bf16(components[0]) if type_name == "bf16" else components[0]
    half = bits(type_name) // 2
    whole = UNSIGNED[2 * half]
    low: Array
    high: Array
    low, high = (join([part], PACKED[type_name]).view(UNSIGNED[half]).astype(whole) for part in components)
    return low | (high << whole(half))
