"""Integer arithmetic, logic, shifts and bit fields (PTX ISA 9.7.1, 9.7.7, 9.7.8)."""

from __future__ import annotations

import numpy as np

from tools.ptx_executor.instructions.registry import instruction
from tools.ptx_executor.lanes import Lanes
from tools.ptx_executor.parsing import Immediate, Instruction
from tools.ptx_executor.scalar_types import (
    BIT_TYPES,
    INTEGER_TYPES,
    PREDICATE,
    SIGNED,
    SIGNED_TYPES,
    UNSIGNED,
    Array,
    bits,
)


def _sources(lanes: Lanes, ins: Instruction, count: int) -> list[Array]:
    return [lanes.read(operand, ins.type) for operand in ins.operands[1 : 1 + count]]


@instruction("add", types=INTEGER_TYPES, modifiers={"sat"})
def add(lanes: Lanes, ins: Instruction) -> Array:
    a, b = _sources(lanes, ins, 2)
    return _saturated(a, b, np.add) if "sat" in ins.modifiers else a + b


@instruction("sub", types=INTEGER_TYPES, modifiers={"sat"})
def sub(lanes: Lanes, ins: Instruction) -> Array:
    a, b = _sources(lanes, ins, 2)
    return _saturated(a, b, np.subtract) if "sat" in ins.modifiers else a - b


def _saturated(a: Array, b: Array, function: np.ufunc) -> Array:
    limits = np.iinfo(np.int32)  # .sat exists for s32 only
    return np.clip(function(a.astype(np.int64), b.astype(np.int64)), limits.min, limits.max).astype(np.int32)


@instruction("mul", types=INTEGER_TYPES, modifiers={"lo", "hi", "wide"})
def mul(lanes: Lanes, ins: Instruction) -> Array:
    a, b = _sources(lanes, ins, 2)
    return _product(a, b, ins)


@instruction("mad", types=INTEGER_TYPES, modifiers={"lo", "hi", "wide"})
def mad(lanes: Lanes, ins: Instruction) -> Array:
    a, b = _sources(lanes, ins, 2)
    product = _product(a, b, ins)
    width = bits(ins.type) * (2 if "wide" in ins.modifiers else 1)
    return product + lanes.read(ins.operands[3], f"{ins.type[0]}{width}")


def _product(a: Array, b: Array, ins: Instruction) -> Array:
    width, family = bits(ins.type), SIGNED if ins.type in SIGNED_TYPES else UNSIGNED
    if ins.choose("lo", "hi", "wide") == "lo":
        return a * b
    if width == 64:
        return _high_64(a, b)
    double: Array = a.astype(family[2 * width]) * b.astype(family[2 * width])
    return double if "wide" in ins.modifiers else (double >> width).astype(family[width])


def _high_64(a: Array, b: Array) -> Array:
    """The upper 64 bits of a product, by halves; signed: the unsigned one less b where a < 0 and a where b < 0."""
    low, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    ua, ub = a.view(np.uint64), b.view(np.uint64)
    a0, a1, b0, b1 = ua & low, ua >> half, ub & low, ub >> half
    middle = a1 * b0 + (a0 * b0 >> half)
    cross = a0 * b1 + (middle & low)
    high = a1 * b1 + (middle >> half) + (cross >> half)
    if a.dtype.kind == "i":
        zero = np.uint64(0)
        high = high - np.where(a < 0, ub, zero) - np.where(b < 0, ua, zero)
    return high.view(a.dtype)


@instruction("div", types=INTEGER_TYPES)
def div(lanes: Lanes, ins: Instruction) -> Array:
    """Towards zero; all ones where the divisor is zero (PTX leaves it open)."""
    a, b = _sources(lanes, ins, 2)
    nonzero = np.where(b == 0, b.dtype.type(1), b)
    quotient = a // nonzero
    if a.dtype.kind == "i":
        quotient = quotient + ((quotient * nonzero != a) & ((a < 0) != (nonzero < 0))).astype(a.dtype)
    return np.where(b == 0, ~a.dtype.type(0), quotient)


@instruction("rem", types=INTEGER_TYPES)
def rem(lanes: Lanes, ins: Instruction) -> Array:
    """The remainder with the sign of the dividend; the dividend itself where the divisor is zero."""
    a, b = _sources(lanes, ins, 2)
    return np.where(b == 0, a, np.fmod(a, np.where(b == 0, b.dtype.type(1), b)))


@instruction("min", types=INTEGER_TYPES)
def minimum(lanes: Lanes, ins: Instruction) -> Array:
    return np.minimum(*_sources(lanes, ins, 2))


@instruction("max", types=INTEGER_TYPES)
def maximum(lanes: Lanes, ins: Instruction) -> Array:
    return np.maximum(*_sources(lanes, ins, 2))


@instruction("abs", types=SIGNED_TYPES)
def absolute(lanes: Lanes, ins: Instruction) -> Array:
    return np.abs(_sources(lanes, ins, 1)[0])


@instruction("neg", types=SIGNED_TYPES)
def neg(lanes: Lanes, ins: Instruction) -> Array:
    return -_sources(lanes, ins, 1)[0]


@instruction("and", types=BIT_TYPES | PREDICATE)
def bitwise_and(lanes: Lanes, ins: Instruction) -> Array:
    a, b = _sources(lanes, ins, 2)
    return a & b


@instruction("or", types=BIT_TYPES | PREDICATE)
def bitwise_or(lanes: Lanes, ins: Instruction) -> Array:
    a, b = _sources(lanes, ins, 2)
    return a | b


@instruction("xor", types=BIT_TYPES | PREDICATE)
def bitwise_xor(lanes: Lanes, ins: Instruction) -> Array:
    a, b = _sources(lanes, ins, 2)
    return a ^ b


@instruction("not", types=BIT_TYPES | PREDICATE)
def bitwise_not(lanes: Lanes, ins: Instruction) -> Array:
    return ~_sources(lanes, ins, 1)[0]


@instruction("cnot", types=BIT_TYPES)
def cnot(lanes: Lanes, ins: Instruction) -> Array:
    a = _sources(lanes, ins, 1)[0]
    return (a == 0).astype(a.dtype)


@instruction("shl", types=BIT_TYPES)
def shl(lanes: Lanes, ins: Instruction) -> Array:
    """Amounts of the width and above give zero."""
    a, amount = lanes.read(ins.operands[1], ins.type), lanes.read(ins.operands[2], "u32")
    inside = np.minimum(amount, bits(ins.type) - 1).astype(a.dtype)
    return np.where(amount >= bits(ins.type), a.dtype.type(0), a << inside)


@instruction("shr", types=BIT_TYPES | INTEGER_TYPES)
def shr(lanes: Lanes, ins: Instruction) -> Array:
    """Arithmetic for signed types; amounts of the width and above give the sign, or zero."""
    a, amount = lanes.read(ins.operands[1], ins.type), lanes.read(ins.operands[2], "u32")
    shifted = a >> np.minimum(amount, bits(ins.type) - 1).astype(a.dtype)
    return shifted if ins.type in SIGNED_TYPES else np.where(amount >= bits(ins.type), a.dtype.type(0), shifted)


@instruction("shf", types={"b32"}, modifiers={"l", "r", "wrap", "clamp"})
def funnel_shift(lanes: Lanes, ins: Instruction) -> Array:
    low, high, amount = (lanes.read(operand, "u32").astype(np.uint64) for operand in ins.operands[1:])
    amount = amount & np.uint64(31) if "wrap" in ins.modifiers else np.minimum(amount, np.uint64(32))
    both = low | high << np.uint64(32)
    moved = both >> amount if "r" in ins.modifiers else (both << amount) >> np.uint64(32)
    return moved.astype(np.uint32)


@instruction("lop3", types={"b32"})
def lop3(lanes: Lanes, ins: Instruction) -> Array:
    """Any function of three bits, by its truth table."""
    a, b, c = _sources(lanes, ins, 3)
    table = _immediate(ins, 4)
    result = np.zeros_like(a & b & c)
    for row in range(8):
        if table >> row & 1:
            result = result | (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def _immediate(ins: Instruction, position: int) -> int:
    operand = ins.operands[position]
    if not isinstance(operand, Immediate):
        raise TypeError(f"operand {position} of `{ins.text}` must be a constant")
    return operand.value


@instruction("prmt", types={"b32"})
def permute_bytes(lanes: Lanes, ins: Instruction) -> Array:
    """Each nibble of the selector picks one of eight bytes, or (bit 3) its sign replicated."""
    a, b, selector = (lanes.read(operand, "u32").astype(np.uint64) for operand in ins.operands[1:])
    both, result = a | b << np.uint64(32), np.zeros(1, np.uint64)
    for position in range(4):
        nibble = selector >> np.uint64(4 * position)
        byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
        sign = np.where(byte & np.uint64(128), np.uint64(255), np.uint64(0))
        result = result | np.where(nibble & np.uint64(8), sign, byte) << np.uint64(8 * position)
    return result.astype(np.uint32)


@instruction("bfe", types={"u32", "u64", "s32", "s64"})
def extract_field(lanes: Lanes, ins: Instruction) -> Array:
    """Bits [position, position + length) with the sign (the field's top bit, clipped to the word) above."""
    width = bits(ins.type)
    a = lanes.read(ins.operands[1], ins.type).astype(np.int64 if ins.type in SIGNED_TYPES else np.uint64)
    position, length = (lanes.read(operand, "u32") & np.uint32(255) for operand in ins.operands[2:4])
    start = np.minimum(position, width - 1).astype(a.dtype)
    moved = np.where(position >= width, -(a < 0).astype(np.int64) if a.dtype.kind == "i" else 0, a >> start)
    raw = moved.astype(a.dtype).view(np.uint64)
    mask = _ones(length)
    sign_at = np.minimum(position + length - np.uint32(1), width - 1).astype(np.uint64)
    negative = (a.view(np.uint64) >> sign_at & np.uint64(1)).astype(bool) & (length > 0) & (ins.type in SIGNED_TYPES)
    return np.where(negative, raw | ~mask, raw & mask).astype(UNSIGNED[width])


@instruction("bfi", types={"b32", "b64"})
def insert_field(lanes: Lanes, ins: Instruction) -> Array:
    a, b = (lanes.read(operand, ins.type).astype(np.uint64) for operand in ins.operands[1:3])
    position, length = (lanes.read(operand, "u32") & np.uint32(255) for operand in ins.operands[3:5])
    inside = position < bits(ins.type)
    start = np.where(inside, position, 0).astype(np.uint64)
    mask = np.where(inside, _ones(length) << start, np.uint64(0))
    return (a << start & mask | b & ~mask).astype(UNSIGNED[bits(ins.type)])


def _ones(length: Array) -> Array:
    """``length`` low ones in 64 bits."""
    partial = (np.uint64(1) << np.minimum(length, 63).astype(np.uint64)) - np.uint64(1)
    return np.where(length >= 64, ~np.uint64(0), partial)


@instruction("popc", types={"b32", "b64"})
def population_count(lanes: Lanes, ins: Instruction) -> Array:
    return count_ones(_sources(lanes, ins, 1)[0])


@instruction("clz", types={"b32", "b64"})
def leading_zeros(lanes: Lanes, ins: Instruction) -> Array:
    a = _sources(lanes, ins, 1)[0]
    for step in (1, 2, 4, 8, 16, 32)[: 5 if ins.type == "b32" else 6]:
        a = a | a >> a.dtype.type(step)
    return count_ones(~a)


@instruction("bfind", types={"u32", "u64", "s32", "s64"}, modifiers={"shiftamt"})
def find_leading(lanes: Lanes, ins: Instruction) -> Array:
    """Position of the highest bit that differs from the sign, or its distance from the top; all ones if none."""
    a = lanes.read(ins.operands[1], ins.type)
    raw: Array = (np.where(a < 0, ~a, a) if a.dtype.kind == "i" else a).astype(UNSIGNED[bits(ins.type)])
    spread = raw
    for step in (1, 2, 4, 8, 16, 32)[: 5 if bits(ins.type) == 32 else 6]:
        spread = spread | spread >> spread.dtype.type(step)
    top = count_ones(spread) - np.uint32(1)
    found = np.uint32(bits(ins.type) - 1) - top if "shiftamt" in ins.modifiers else top
    return np.where(raw == 0, np.uint32(0xFFFFFFFF), found)


@instruction("brev", types={"b32", "b64"})
def reverse_bits(lanes: Lanes, ins: Instruction) -> Array:
    a = _sources(lanes, ins, 1)[0]
    result = np.zeros_like(a)
    for i in range(bits(ins.type)):
        result |= (a >> a.dtype.type(i) & a.dtype.type(1)) << a.dtype.type(bits(ins.type) - 1 - i)
    return result


def count_ones(values: Array) -> Array:
    """Set bits of unsigned integers, as uint32."""
    return np.unpackbits(np.ascontiguousarray(values)[:, None].view(np.uint8), axis=1).sum(1, dtype=np.uint32)
