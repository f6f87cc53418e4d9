"""Comparison and selection (PTX ISA 9.7.6)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tools.ptx_executor.instructions.registry import instruction
from tools.ptx_executor.lanes import Lanes
from tools.ptx_executor.parsing import Instruction, Pair
from tools.ptx_executor.scalar_types import ALL_TYPES, FLOAT_TYPES, PACKED_TYPES, Array, flush_subnormals

COMPARE: dict[str, Callable[[Array, Array], Array]] = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
UNORDERED = {f"{name}u": COMPARE[name] for name in ("eq", "ne", "lt", "le", "gt", "ge")}
COMBINE: dict[str, Callable[[Array, Array], Array]] = {
    "and": np.logical_and,
    "or": np.logical_or,
    "xor": np.logical_xor,
}
COMPARISONS = {*COMPARE, *UNORDERED, "num", "nan"}


def _compare(name: str, a: Array, b: Array) -> Array:
    """An ordered comparison with a NaN is false, an unordered one (``ltu``) true."""
    if a.dtype.kind != "f":
        return COMPARE[name](a, b)
    nan = np.isnan(a) | np.isnan(b)
    if name in ("num", "nan"):
        return ~nan if name == "num" else nan
    return UNORDERED[name](a, b) | nan if name in UNORDERED else COMPARE[name](a, b) & ~nan


@instruction("setp", types=ALL_TYPES - {"pred", "f32x2"}, modifiers={*COMPARISONS, *COMBINE, "ftz"})
def setp(lanes: Lanes, ins: Instruction) -> None:
    """One or two predicates: the comparison and its complement, or (packed) those of the low and high halves."""
    name = ins.choose(*COMPARISONS)
    a, b = (_values(lanes, ins, position) for position in (1, 2))
    results = [_compare(name, x, y) for x, y in zip(a, b, strict=True)]
    if len(results) == 1:
        results.append(~results[0])
    if len(ins.operands) == 4:
        condition = lanes.read(ins.operands[3], "pred")
        results = [COMBINE[ins.choose(*COMBINE)](result, condition) for result in results]
    targets = ins.operands[0]
    pair = (targets.first, targets.second) if isinstance(targets, Pair) else (targets,)
    for target, result in zip(pair, results, strict=False):
        lanes.write(target, result)


def _values(lanes: Lanes, ins: Instruction, position: int) -> list[Array]:
    if ins.type not in FLOAT_TYPES | PACKED_TYPES:
        return [lanes.read(ins.operands[position], ins.type)]
    parts = lanes.read_components(ins.operands[position], ins.type)
    return [flush_subnormals(part) for part in parts] if "ftz" in ins.modifiers else parts


@instruction("set", types={"u32", "s32", "f32", "s64", "u64", "f64"}, modifiers={*COMPARISONS, "ftz"})
def set_value(lanes: Lanes, ins: Instruction) -> Array:
    """All ones, or 1.0 for a float destination, where the comparison holds."""
    result = _compare(ins.choose(*COMPARISONS), _values(lanes, ins, 1)[0], _values(lanes, ins, 2)[0])
    if ins.types[0] == "f32":
        return result.astype(np.float32)
    return np.where(result, np.uint32(0xFFFFFFFF), np.uint32(0))


@instruction("selp")
def selp(lanes: Lanes, ins: Instruction) -> Array:
    condition = lanes.read(ins.operands[3], "pred")
    return np.where(condition, lanes.read(ins.operands[1], ins.type), lanes.read(ins.operands[2], ins.type))


@instruction("slct", modifiers={"ftz"})
def slct(lanes: Lanes, ins: Instruction) -> Array:
    """The first source where the third is not negative, else the second."""
    condition = lanes.read(ins.operands[3], ins.type) >= 0
    return np.where(condition, lanes.read(ins.operands[1], ins.types[0]), lanes.read(ins.operands[2], ins.types[0]))


@instruction(
    "testp", types={"f32", "f64"}, modifiers={"finite", "infinite", "number", "notanumber", "normal", "subnormal"}
)
def testp(lanes: Lanes, ins: Instruction) -> Array:
    """A class of numbers; zeros count as normal."""
    a = lanes.read(ins.operands[1], ins.type)
    subnormal = (np.abs(a) < np.finfo(a.dtype).tiny) & (a != 0)
    tests = {
        "finite": np.isfinite(a),
        "infinite": np.isinf(a),
        "number": ~np.isnan(a),
        "notanumber": np.isnan(a),
        "normal": np.isfinite(a) & ~subnormal,
        "subnormal": subnormal,
    }
    return tests[ins.choose(*tests)]
