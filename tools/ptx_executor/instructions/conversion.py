"""``cvt`` between all types and the address-space conversion ``cvta`` (PTX ISA 9.7.9)."""

from __future__ import annotations

import numpy as np

from tools.ptx_executor import rounding
from tools.ptx_executor.instructions.registry import instruction
from tools.ptx_executor.lanes import Lanes
from tools.ptx_executor.parsing import Instruction, Register
from tools.ptx_executor.scalar_types import (
    FLOAT,
    FLOAT_TYPES,
    INTEGER_TYPES,
    PACKED,
    SIGNED,
    SIGNED_TYPES,
    UNSIGNED,
    Array,
    bits,
    canonical_nan,
    f32_to_bf16,
    flush_subnormals,
)

INTEGER_ROUNDING = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor, "rpi": np.ceil}
ROUNDING = set(rounding.MODES)


@instruction("cvt", types=FLOAT_TYPES | INTEGER_TYPES, modifiers={*ROUNDING, *INTEGER_ROUNDING, "ftz", "sat", "relu"})
def convert(lanes: Lanes, ins: Instruction) -> Array:
    target, source = ins.types
    values = lanes.read_components(ins.operands[1], source)[0] if source in FLOAT_TYPES else None
    if values is None:
        integers = lanes.read(ins.operands[1], source)
        return _integer_to_float(integers, ins) if target in FLOAT_TYPES else _between_integers(integers, lanes, ins)
    if "ftz" in ins.modifiers:
        values = flush_subnormals(values)
    return _between_floats(values, ins) if target in FLOAT_TYPES else _float_to_integer(values, target, ins)


@instruction("cvt", types={"f16x2", "bf16x2", "f32"}, modifiers={"rn", "rz", "relu"})
def convert_packed(lanes: Lanes, ins: Instruction) -> Array:
    """Two float32 to a packed pair: the first source becomes the high half."""
    mode, half = ins.choose("rn", "rz"), PACKED[ins.types[0]]
    parts = []
    for operand in (ins.operands[2], ins.operands[1]):
        values = lanes.read(operand, "f32")
        if "relu" in ins.modifiers:
            values = _relu(values)
        parts.append(_round(values, half, mode).view(np.uint16))
    low, high = (part.astype(np.uint32) for part in parts)
    return low | high << np.uint32(16)


@instruction("cvt", types={"b32", "f32"}, modifiers={"rna", "tf32"})
def convert_tf32(lanes: Lanes, ins: Instruction) -> Array:
    """To 10 bits of mantissa, ties away from zero; never reached by ``.tf32.f32`` with another mode."""
    raw = lanes.read(ins.operands[1], "b32")
    finite = (raw & np.uint32(0x7F800000)) != np.uint32(0x7F800000)
    return np.where(finite, (raw + np.uint32(0x1000)) & np.uint32(0xFFFFE000), raw)


def _relu(values: Array) -> Array:
    """max(x, +0) with NaN kept."""
    return np.where(np.isnan(values) | (values > 0), values, values.dtype.type(0))


def _round(values: Array, target: str, mode: str) -> Array:
    """Floats or integers to a float type (bf16 as its bits), NaN canonical."""
    if target == "bf16":
        if mode == "rn" and values.dtype == np.float32:
            return f32_to_bf16(values)
        return rounding.round_to_bf16(values, mode)
    return canonical_nan(rounding.round_to(values, FLOAT[bits(target)], mode))


def _integer_to_float(values: Array, ins: Instruction) -> Array:
    result = _round(values, ins.types[0], ins.choose(*rounding.MODES))
    if "sat" in ins.modifiers:
        raise NotImplementedError(f"`{ins.text}`: .sat of an integer source")
    return result


def _between_floats(values: Array, ins: Instruction) -> Array:
    for name, function in INTEGER_ROUNDING.items():
        if name in ins.modifiers:
            values = function(values)
    if "sat" in ins.modifiers:
        values = np.where(values > 0, np.minimum(values, values.dtype.type(1)), values.dtype.type(0))
    if "relu" in ins.modifiers:
        values = _relu(values)
    result = _round(values, ins.types[0], ins.choose(*rounding.MODES, default="rn"))
    return flush_subnormals(result) if "ftz" in ins.modifiers else result


def _float_to_integer(values: Array, target: str, ins: Instruction) -> Array:
    """Round, clamp to the type's range; NaN becomes 0."""
    family = SIGNED if target in SIGNED_TYPES else UNSIGNED
    limits = np.iinfo(family[bits(target)])
    wide = INTEGER_ROUNDING[ins.choose(*INTEGER_ROUNDING)](values.astype(np.float64))
    above, below = wide >= float(limits.max), wide <= float(limits.min)
    inside: Array = np.where(above | below | np.isnan(wide), 0.0, wide).astype(family[bits(target)])
    return np.where(above, limits.max, np.where(below, limits.min, inside)).astype(family[bits(target)])


def _between_integers(values: Array, lanes: Lanes, ins: Instruction) -> Array:
    """Truncate or extend (by the sign of the source), or clamp with ``.sat``; the register may be wider still."""
    target = ins.types[0]
    family = SIGNED if target in SIGNED_TYPES else UNSIGNED
    dtype = family[bits(target)]
    if "sat" in ins.modifiers:
        limits, have = np.iinfo(dtype), np.iinfo(values.dtype)
        low = values.dtype.type(max(limits.min, have.min))
        high = values.dtype.type(min(limits.max, have.max))
        values = np.clip(values, low, high)
    result: Array = values.astype(dtype)
    destination = ins.operands[0]
    width = destination.width if isinstance(destination, Register) else bits(target)
    return result.astype(family[max(width, bits(target))])


@instruction("cvta", types={"u64", "u32"}, modifiers={"to", "global", "param"})
def convert_address(lanes: Lanes, ins: Instruction) -> Array:
    """Generic addresses are global ones here, so both ways are a move."""
    return lanes.read(ins.operands[1], ins.type)
