"""Approximate instructions: computed in float64, then off by up to what the PTX ISA allows when noise is asked for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tools.ptx_executor.instructions.floating import compute
from tools.ptx_executor.instructions.registry import instruction
from tools.ptx_executor.lanes import Lanes
from tools.ptx_executor.parsing import Instruction
from tools.ptx_executor.scalar_types import Array

ULPS = {"div": 2, "rcp": 1, "sqrt": 1, "rsqrt": 2, "ex2": 2, "tanh": 2**12}
HALF_PRECISION_ULPS = {"ex2": 1, "tanh": 1}
LG2_ERROR = 2.0**-22  # absolute inside (0.5, 2), relative outside
SINE_ERROR = 2.0**-20.5  # absolute, inside [-pi, pi]


def _by_ulps(lanes: Lanes, ins: Instruction, function: Callable[..., Array]) -> Callable[..., Array]:
    """Round to the type and move by a random number of ulps; zeros, infinities and NaN are exact."""

    def approximate(*parts: Array) -> Array:
        dtype = parts[0].dtype
        result = function(*[part.astype(np.float64) for part in parts]).astype(dtype)
        if not lanes.threads.noise:
            return result
        if ins.type == "f32":
            integer, ulps = np.int32, ULPS[ins.opcode]
        else:
            integer, ulps = {2: np.int16, 4: np.int32}[dtype.itemsize], HALF_PRECISION_ULPS[ins.opcode]
            ulps <<= 16 if ins.type.startswith("bf16") else 0
        steps = lanes.threads.rng.integers(-ulps, ulps + 1, result.shape)
        moves = np.isfinite(result) & (result != 0) & (result != 1)
        moved = (result.view(integer) + np.where(moves, steps, 0)).astype(integer).view(dtype)
        return np.where(np.isfinite(moved), moved, result)

    return approximate


def _by_error(
    lanes: Lanes, function: Callable[[Array], Array], bound: Callable[[Array], Array]
) -> Callable[..., Array]:
    """Add a random error of at most ``bound(result)``."""

    def approximate(a: Array) -> Array:
        result = function(a.astype(np.float64))
        if lanes.threads.noise:
            result = result + lanes.threads.rng.uniform(-1, 1, result.shape) * bound(result)
        return result.astype(np.float32)

    return approximate


@instruction("div", types={"f32"}, modifiers={"approx", "ftz"})
@instruction("div", types={"f32"}, modifiers={"full", "ftz"})
def div(lanes: Lanes, ins: Instruction) -> Array:
    """``.approx`` gives zero where the divisor is above 2^126 (infinity over it: NaN)."""

    def quotient(a: Array, b: Array) -> Array:
        exact = a / b
        if "approx" not in ins.modifiers:
            return exact
        huge = (np.abs(b) > 2.0**126) & np.isfinite(b)
        return np.where(huge, np.where(np.isinf(a), np.nan, np.copysign(0.0, exact)), exact)

    return compute(lanes, ins, 2, _by_ulps(lanes, ins, quotient))


@instruction("rcp", types={"f32", "f64"}, modifiers={"approx", "ftz"})
def rcp(lanes: Lanes, ins: Instruction) -> Array:
    """In float64 (``.ftz`` only) a seed for Newton's iteration: it reads and gives the upper 32 bits."""
    if "f64" in ins.types:
        return compute(lanes, ins, 1, lambda a: _seed(lanes, a))
    return compute(lanes, ins, 1, _by_ulps(lanes, ins, lambda a: 1.0 / a))


def _seed(lanes: Lanes, a: Array) -> Array:
    """1 / a between the upper halves of float64, subnormals as zeros; noise is one unit of the upper half."""
    source = _upper_half(a)
    source = np.where(np.abs(source) < np.finfo(np.float64).tiny, np.copysign(0.0, source), source)
    exact = 1.0 / source
    result = _upper_half(np.where(np.abs(exact) < np.finfo(np.float64).tiny, np.copysign(0.0, exact), exact))
    if not lanes.threads.noise:
        return result
    steps = lanes.threads.rng.integers(-1, 2, result.shape) << 32
    moved = (result.view(np.int64) + steps).view(np.float64)
    return np.where(np.isfinite(moved) & np.isfinite(result) & (result != 0), moved, result)


def _upper_half(a: Array) -> Array:
    """float64 with the lower 32 bits cleared."""
    return (np.ascontiguousarray(a).view(np.uint64) & np.uint64(0xFFFFFFFF00000000)).view(np.float64)


@instruction("sqrt", types={"f32"}, modifiers={"approx", "ftz"})
def sqrt(lanes: Lanes, ins: Instruction) -> Array:
    return compute(lanes, ins, 1, _by_ulps(lanes, ins, np.sqrt))


@instruction("rsqrt", types={"f32"}, modifiers={"approx", "ftz"})
def rsqrt(lanes: Lanes, ins: Instruction) -> Array:
    return compute(lanes, ins, 1, _by_ulps(lanes, ins, lambda a: 1.0 / np.sqrt(a)))


@instruction("ex2", types={"f32", "f16", "f16x2", "bf16", "bf16x2"}, modifiers={"approx", "ftz"})
def ex2(lanes: Lanes, ins: Instruction) -> Array:
    return compute(lanes, ins, 1, _by_ulps(lanes, ins, np.exp2))


@instruction("tanh", types={"f32", "f16", "f16x2", "bf16", "bf16x2"}, modifiers={"approx"})
def tanh(lanes: Lanes, ins: Instruction) -> Array:
    return compute(lanes, ins, 1, _by_ulps(lanes, ins, np.tanh))


@instruction("lg2", types={"f32"}, modifiers={"approx", "ftz"})
def lg2(lanes: Lanes, ins: Instruction) -> Array:
    def bound(result: Array) -> Array:
        finite = np.where(np.isfinite(result), np.abs(result), 0.0)
        return LG2_ERROR * np.where(finite < 1, 1.0, finite)

    return compute(lanes, ins, 1, _by_error(lanes, np.log2, bound))


@instruction("sin", types={"f32"}, modifiers={"approx", "ftz"})
def sin(lanes: Lanes, ins: Instruction) -> Array:
    return compute(lanes, ins, 1, _by_error(lanes, np.sin, lambda result: np.full_like(result, SINE_ERROR)))


@instruction("cos", types={"f32"}, modifiers={"approx", "ftz"})
def cos(lanes: Lanes, ins: Instruction) -> Array:
    return compute(lanes, ins, 1, _by_error(lanes, np.cos, lambda result: np.full_like(result, SINE_ERROR)))
