"""Exactly rounded floating point: scalar, packed and mixed precision (PTX ISA 9.7.3, 9.7.4, 9.7.5)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tools.ptx_executor import rounding
from tools.ptx_executor.instructions.registry import instruction
from tools.ptx_executor.lanes import Lanes
from tools.ptx_executor.parsing import Instruction
from tools.ptx_executor.scalar_types import (
    FLOAT_TYPES,
    PACKED,
    PACKED_TYPES,
    UNSIGNED,
    Array,
    bits,
    canonical_nan,
    flush_subnormals,
    join,
)

ARITHMETIC = FLOAT_TYPES | PACKED_TYPES
FINISH = {"ftz", "sat"}
DIRECTED = {"rz", "rm", "rp"}


def compute(lanes: Lanes, ins: Instruction, sources: int, function: Callable[..., Array]) -> Array:
    """Apply ``function`` to the components of the sources; ``.ftz`` on both sides, ``.sat``, canonical NaN.

    ``function`` may return a wider float, which is rounded to the type. With two types (``fma.rn.f32.bf16``) all
    sources but the last are of the second one.
    """
    result_type = ins.types[0]
    source_types = [ins.type] * sources
    if len(ins.types) == 2:
        source_types[-1] = result_type
    flush = flush_subnormals if "ftz" in ins.modifiers else lambda values: values
    columns = [lanes.read_components(operand, t) for operand, t in zip(ins.operands[1:], source_types, strict=False)]
    results = []
    for parts in zip(*columns, strict=True):
        if len(ins.types) == 2:
            parts = tuple(part.astype(np.float32) for part in parts)
        result = flush(function(*[flush(part) for part in parts]))
        if "sat" in ins.modifiers:
            result = np.where(result > 0, np.minimum(result, result.dtype.type(1)), result.dtype.type(0))
        results.append(canonical_nan(result))
    return join(results, result_type)


def _rounded(exact: Callable[..., Array], ins: Instruction) -> Callable[..., Array]:
    """A function of floats through an exact or odd-rounded float64 result, in the instruction's rounding mode."""
    mode = ins.choose(*DIRECTED, default="rn")
    scalar = PACKED.get(ins.types[0], ins.types[0])

    def function(*parts: Array) -> Array:
        if scalar == "bf16":
            raw = rounding.round_to_bf16(exact(*parts), mode)
            return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32)
        return rounding.round_to(exact(*parts), {"f16": np.float16, "f32": np.float32}[scalar], mode)

    return function


def _directed(ins: Instruction) -> bool:
    return bool(DIRECTED & ins.modifiers)


@instruction("add", types=ARITHMETIC - {"f64"}, modifiers={"rn", *FINISH, *DIRECTED})
@instruction("add", types={"f64"}, modifiers={"rn"})
def add(lanes: Lanes, ins: Instruction) -> Array:
    return compute(lanes, ins, 2, _rounded(rounding.add_odd, ins) if _directed(ins) else np.add)


@instruction("sub", types=ARITHMETIC - {"f64"}, modifiers={"rn", *FINISH, *DIRECTED})
@instruction("sub", types={"f64"}, modifiers={"rn"})
def sub(lanes: Lanes, ins: Instruction) -> Array:
    def exact(a: Array, b: Array) -> Array:
        return rounding.add_odd(a, -b)

    return compute(lanes, ins, 2, _rounded(exact, ins) if _directed(ins) else np.subtract)


@instruction("mul", types=ARITHMETIC - {"f64"}, modifiers={"rn", *FINISH, *DIRECTED})
@instruction("mul", types={"f64"}, modifiers={"rn"})
def mul(lanes: Lanes, ins: Instruction) -> Array:
    def exact(a: Array, b: Array) -> Array:
        return a.astype(np.float64) * b.astype(np.float64)

    return compute(lanes, ins, 2, _rounded(exact, ins) if _directed(ins) else np.multiply)


@instruction("fma", "mad", types=ARITHMETIC - {"f64"}, modifiers={"rn", *FINISH, *DIRECTED})
@instruction("fma", "mad", types={"f64"}, modifiers={"rn"})
def fma(lanes: Lanes, ins: Instruction) -> Array:
    return compute(lanes, ins, 3, rounding.fma_f64 if ins.type == "f64" else _rounded(rounding.fma_odd, ins))


@instruction("div", types={"f32"}, modifiers={"rn", "ftz", *DIRECTED})
@instruction("div", types={"f64"}, modifiers={"rn"})
def div(lanes: Lanes, ins: Instruction) -> Array:
    return compute(lanes, ins, 2, _rounded(_quotient, ins) if _directed(ins) else np.divide)


def _quotient(a: Array, b: Array) -> Array:
    """A float32 quotient in float64: exact, or too far from any float32 for its rounding to matter."""
    return a.astype(np.float64) / b.astype(np.float64)


@instruction("rcp", types={"f32", "f64"}, modifiers={"rn", "ftz"})
def rcp(lanes: Lanes, ins: Instruction) -> Array:
    return compute(lanes, ins, 1, lambda a: a.dtype.type(1) / a)


@instruction("sqrt", types={"f32", "f64"}, modifiers={"rn", "ftz"})
def sqrt(lanes: Lanes, ins: Instruction) -> Array:
    return compute(lanes, ins, 1, np.sqrt)


@instruction("min", types=ARITHMETIC - {"f32x2"}, modifiers={"ftz", "NaN"})
def minimum(lanes: Lanes, ins: Instruction) -> Array:
    return compute(lanes, ins, len(ins.operands) - 1, _extreme(ins, smallest=True))


@instruction("max", types=ARITHMETIC - {"f32x2"}, modifiers={"ftz", "NaN"})
def maximum(lanes: Lanes, ins: Instruction) -> Array:
    return compute(lanes, ins, len(ins.operands) - 1, _extreme(ins, smallest=False))


def _extreme(ins: Instruction, *, smallest: bool) -> Callable[..., Array]:
    """-0 < +0; a NaN loses to a number, or wins with ``.NaN``; two or three sources."""

    def pair(a: Array, b: Array) -> Array:
        first = np.where(a == b, np.signbit(a) == smallest, (a < b) == smallest)
        result = np.where(first, a, b)
        if "NaN" in ins.modifiers:
            return np.where(np.isnan(a) | np.isnan(b), a.dtype.type(np.nan), result)
        return np.where(np.isnan(a), b, np.where(np.isnan(b), a, result))

    def function(first: Array, *rest: Array) -> Array:
        for other in rest:
            first = pair(first, other)
        return first

    return function


@instruction("abs", types=ARITHMETIC - {"f32x2"}, modifiers={"ftz"})
def absolute(lanes: Lanes, ins: Instruction) -> Array:
    return _on_sign(lanes, ins, lambda raw, sign: raw & ~sign)


@instruction("neg", types=ARITHMETIC - {"f32x2"}, modifiers={"ftz"})
def neg(lanes: Lanes, ins: Instruction) -> Array:
    return _on_sign(lanes, ins, lambda raw, sign: raw ^ sign)


def _on_sign(lanes: Lanes, ins: Instruction, function: Callable[[Array, Array], Array]) -> Array:
    width = bits(ins.type)
    signs = 1 << (width - 1) | (1 << (width // 2 - 1) if ins.type in PACKED else 0)
    result = function(lanes.read_bits(ins.operands[1], width), np.array([signs], UNSIGNED[width]))
    return flush_subnormals(result.view(np.float32)) if "ftz" in ins.modifiers and ins.type == "f32" else result


@instruction("copysign", types={"f32", "f64"})
def copysign(lanes: Lanes, ins: Instruction) -> Array:
    """The sign of the first source on the magnitude of the second."""
    return np.copysign(lanes.read(ins.operands[2], ins.type), lanes.read(ins.operands[1], ins.type))
