"""A unit test for every row of the instruction table; the last test shows that none is left out.

Each case runs a line or two of PTX on small arrays and compares with the result that the PTX ISA defines.
test_arithmetic.py tests rounding, edge values and random operands; test_executor.py tests divergence, races and
barriers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import pytest

from tools.ptx_executor import Options, PtxError
from tools.ptx_executor.instructions import registry
from tools.ptx_executor.parsing import Instruction
from tools.ptx_executor.scalar_types import Array
from tools.ptx_executor.snippets import evaluate

ALL = 2**32 - 1


class Case(NamedTuple):
    """A statement of which ``%out`` is ``expected``, by type; ``inputs``: the values of ``%a``, ``%b``, ..."""

    text: str
    expected: Array
    inputs: tuple[Array, ...]


def f16(*values: float) -> Array:
    return np.array(values, np.float16)


def f32(*values: float) -> Array:
    return np.array(values, np.float32)


def f64(*values: float) -> Array:
    return np.array(values, np.float64)


def u16(*values: int) -> Array:
    return np.array(values, np.uint16)


def u32(*values: int) -> Array:
    return np.array(values, np.uint32)


def s32(*values: int) -> Array:
    return np.array(values, np.int32)


def u64(*values: int) -> Array:
    return np.array(values, np.uint64)


def case(text: str, expected: Array, *inputs: Array) -> Case:
    return Case(text, expected, inputs)


INTEGER = [
    case("abs.s32 %out, %a;", s32(5, 0, -(2**31)), s32(-5, 0, -(2**31))),
    case("add.u32 %out, %a, %b;", u32(0, 7), u32(ALL, 3), u32(1, 4)),
    case("and.b32 %out, %a, %b;", u32(0b1000), u32(0b1100), u32(0b1010)),
    case("bfe.s32 %out, %a, 4, 8;", s32(-1, 0x12), s32(0xFF0, 0x123)),
    case("bfi.b32 %out, %a, %b, 8, 4;", u32(0xFFFFF5FF), u32(0x75), u32(ALL)),
    case("bfind.u32 %out, %a;", u32(31, 4, ALL), u32(ALL, 16, 0)),
    case("bfind.shiftamt.u32 %out, %a;", u32(0, 27, ALL), u32(ALL, 16, 0)),
    case("brev.b32 %out, %a;", u32(1 << 31, 0b11 << 28), u32(1, 0b1100)),
    case("clz.b32 %out, %a;", u32(32, 31, 0), u32(0, 1, ALL)),
    case("cnot.b32 %out, %a;", u32(1, 0, 0), u32(0, 1, ALL)),
    case("div.s32 %out, %a, %b;", s32(-3, -3, 3), s32(-7, 7, -7), s32(2, -2, -2)),
    case("lop3.b32 %out, %a, %b, %c, 0x96;", u32(0b01101001), u32(0b00001111), u32(0b00110011), u32(0b01010101)),
    case("mad.lo.u32 %out, %a, %b, %c;", u32(17, 1), u32(3, ALL), u32(4, ALL), u32(5, 0)),
    case("max.s32 %out, %a, %b;", s32(1, -1), s32(1, -2), s32(-1, -1)),
    case("min.u32 %out, %a, %b;", u32(1, 0), u32(1, 0), u32(ALL, 7)),
    case("mul.wide.s32 %out, %a, %b;", np.array([2**62, -6]), s32(-(2**31), 2), s32(-(2**31), -3)),
    case("neg.s32 %out, %a;", s32(5, -(2**31)), s32(-5, -(2**31))),
    case("not.b32 %out, %a;", u32(0, 0xFFFF0000), u32(ALL, 0xFFFF)),
    case("or.b32 %out, %a, %b;", u32(0b1110), u32(0b1100), u32(0b1010)),
    case("popc.b32 %out, %a;", u32(0, 32, 2), u32(0, ALL, 0x8001)),
    case("prmt.b32 %out, %a, %b, 0x5410;", u32(0x77883344), u32(0x11223344), u32(0x55667788)),
    case("rem.s32 %out, %a, %b;", s32(-1, 1, -1), s32(-7, 7, -7), s32(2, -2, -2)),
    case("shf.l.clamp.b32 %out, %a, %b, %c;", u32(0x22222222, 1), u32(0x22222222, 1 << 31), u32(0, 0), u32(40, 1)),
    case("shl.b32 %out, %a, %b;", u32(12, 0), u32(3, 3), u32(2, 32)),
    case("shr.s32 %out, %a, %b;", s32(-2, -1), s32(-8, -8), u32(2, 99)),
    case("sub.u32 %out, %a, %b;", u32(ALL, 1), u32(0, 5), u32(1, 4)),
    case("xor.b32 %out, %a, %b;", u32(0b0110), u32(0b1100), u32(0b1010)),
]
FLOATING = [
    case("abs.f32 %out, %a;", f32(1.5, math.inf), f32(-1.5, -math.inf)),
    case("add.rn.f32 %out, %a, %b;", f32(2**24), f32(2**24), f32(1)),
    case("add.rn.f64 %out, %a, %b;", f64(2**24 + 1), f64(2**24), f64(1)),
    case("copysign.f32 %out, %a, %b;", f32(-2, 2), f32(-0.0, 1), f32(2, -2)),
    case("div.rn.f32 %out, %a, %b;", f32(np.float32(1) / np.float32(3), math.inf), f32(1, 1), f32(3, 0)),
    case("div.rn.f64 %out, %a, %b;", f64(1 / 3), f64(1), f64(3)),
    case("fma.rn.f32 %out, %a, %b, %c;", f32(-(2**-46)), f32(1 + 2**-23), f32(1 - 2**-23), f32(-1)),
    case("fma.rn.f64 %out, %a, %b, %c;", f64(-(2**-104)), f64(1 + 2**-52), f64(1 - 2**-52), f64(-1)),
    case("mad.rn.f32 %out, %a, %b, %c;", f32(-(2**-46)), f32(1 + 2**-23), f32(1 - 2**-23), f32(-1)),
    case("mad.rn.f64 %out, %a, %b, %c;", f64(-(2**-104)), f64(1 + 2**-52), f64(1 - 2**-52), f64(-1)),
    case("max.f32 %out, %a, %b;", f32(2, 3), f32(2, math.nan), f32(1, 3)),
    case("min.f32 %out, %a, %b;", f32(1, 3), f32(2, math.nan), f32(1, 3)),
    case("mul.rn.f32 %out, %a, %b;", f32(1 + 2**-22), f32(1 + 2**-23), f32(1 + 2**-23)),
    case("mul.rn.f64 %out, %a, %b;", f64(1 + 2**-22 + 2**-46), f64(1 + 2**-23), f64(1 + 2**-23)),
    case("neg.f32 %out, %a;", f32(-1.5, math.inf), f32(1.5, -math.inf)),
    case("rcp.rn.f64 %out, %a;", f64(1 / 3, math.inf), f64(3, 0)),
    case("sqrt.rn.f32 %out, %a;", f32(3, np.sqrt(np.float32(2))), f32(9, 2)),
    case("sub.rn.f32 %out, %a, %b;", f32(-1), f32(1), f32(2)),
    case("sub.rn.f64 %out, %a, %b;", f64(1 - 2**-40), f64(1), f64(2**-40)),
]
APPROXIMATE = [  # without noise: the nearest float32
    case("cos.approx.f32 %out, %a;", f32(1, np.cos(0.5)), f32(0, 0.5)),
    case("div.approx.f32 %out, %a, %b;", f32(0.1, 0), f32(1, 1), f32(10, 2.0**127)),
    case("div.full.f32 %out, %a, %b;", f32(0.1, 2.0**-127), f32(1, 1), f32(10, 2.0**127)),
    case("ex2.approx.f32 %out, %a;", f32(8, math.sqrt(0.5)), f32(3, -0.5)),
    case("lg2.approx.f32 %out, %a;", f32(3, math.log2(3), -math.inf), f32(8, 3, 0)),
    case("rcp.approx.f32 %out, %a;", f32(0.1, math.inf), f32(10, 0)),
    case("rsqrt.approx.f32 %out, %a;", f32(0.5, 1 / math.sqrt(3)), f32(4, 3)),
    case("sin.approx.f32 %out, %a;", f32(0, np.sin(0.5)), f32(0, 0.5)),
    case("sqrt.approx.f32 %out, %a;", f32(2, math.sqrt(3)), f32(4, 3)),
    case("tanh.approx.f32 %out, %a;", f32(0, math.tanh(0.5)), f32(0, 0.5)),
]
CONVERSION_AND_CHOICE = [
    case("cvt.rn.f16.f32 %out, %a;", f16(1, 1 + 2**-9), f32(1 + 2**-11, 1 + 3 * 2**-11)),
    case("cvt.rn.f16x2.f32 %out, %a, %b;", u32(0x3C004000), f32(1), f32(2)),
    case("cvt.rna.tf32.f32 %out, %a;", u32(0x3F802000, 0x7F800000), u32(0x3F801000, 0x7F800000)),
    case("cvta.to.global.u64 %out, %a;", u64(2**47 - 1), u64(2**47 - 1)),
    case("mov.b64 %out, {%a, %b};", u64(1 << 32 | 7), u32(7), u32(1)),
    case("selp.u32 %out, %a, %b, 1;", u32(3), u32(3), u32(4)),
    case("set.lt.f32.s32 %out, %a, %b;", f32(1, 0), s32(-1, 1), s32(0, 0)),
    case("set.ge.u32.f32 %out, %a, %b;", u32(ALL, 0), f32(1, math.nan), f32(1, 1)),
    case("setp.gt.u32 %p1, %a, 5; selp.u32 %out, 1, 0, %p1;", u32(1, 0), u32(6, 5)),
    case("slct.u32.s32 %out, %a, %b, %c;", u32(1, 2), u32(1, 1), u32(2, 2), s32(0, -1)),
    *(
        case(f"testp.{name}.f32 %p1, %a; selp.u32 %out, 1, 0, %p1;", u32(*holds), f32(0, 1, 1e-40, math.inf, math.nan))
        for name, holds in {
            "finite": (1, 1, 1, 0, 0),
            "infinite": (0, 0, 0, 1, 0),
            "number": (1, 1, 1, 1, 0),
            "notanumber": (0, 0, 0, 0, 1),
            "normal": (1, 1, 0, 0, 0),
            "subnormal": (0, 0, 1, 0, 0),
        }.items()
    ),
]
SHARED = """.shared .align 16 .b8 buffer[4096];
    mov.u32 %r1, %tid.x; shl.b32 %r2, %r1, 4; mov.u32 %r3, buffer; add.u32 %r3, %r3, %r2;"""
WAIT, MATRIX = "cp.async.wait_all;", ".sync.aligned.m8n8.x1.shared.b16"
WARP_AND_MEMORY = [  # 128 threads, one an element; the inputs repeat themselves; %rd0 is the address of %a
    case("activemask.b32 %out;", u32(ALL), u32(0)),
    case("elect.sync %out|%p1, 0xFFFFFFF0;", u32(4), u32(0)),
    case("redux.sync.add.u32 %out, %a, -1;", u32(48, 48), u32(1, 2)),
    case("shfl.sync.bfly.b32 %out, %a, 1, 31, -1;", u32(9, 8), u32(8, 9)),
    case("setp.eq.u32 %p1, %a, 1; vote.sync.ballot.b32 %out, %p1, -1;", u32(*[0x55555555] * 2), u32(1, 2)),
    case("ld.global.u16 %out, [%rd0+2];", u32(0xABCD), u32(0xABCD1234)),
    case("atom.global.add.u32 %out, [%rd0], 5;", u32(7, 8), u32(7, 8)),
    case("red.global.max.u32 [%rd0], 8; ld.global.u32 %out, [%rd0];", u32(8, 9), u32(7, 9)),
    case("st.global.u16 [%rd0], 1; ld.global.u32 %out, [%rd0];", u32(0x20001), u32(0x20007)),
    case(f"{SHARED} cp.async.ca.shared.global [%r3], [%rd0], 4; {WAIT} ld.shared.u32 %out, [%r3];", u32(7), u32(7)),
    case(f"{SHARED} stmatrix{MATRIX} [%r3], {{%a}}; ldmatrix{MATRIX} {{%out}}, [%r3];", u32(5, 6), u32(5, 6)),
]
CONTROL = [
    case("setp.eq.u32 %p1, %a, 9; @%p1 trap; mov.u32 %out, %a;", u32(1, 2), u32(1, 2)),
    case("bra $L; mov.u32 %a, 9; $L: mov.u32 %out, %a;", u32(1, 2), u32(1, 2)),
    case("setp.eq.u32 %p1, %a, 2; @%p1 exit; mov.u32 %out, 7;", u32(7, 0), u32(1, 2)),
    case("setp.eq.u32 %p1, %a, 2; @%p1 ret; mov.u32 %out, 7;", u32(7, 0), u32(1, 2)),
    *(
        case(f"{nothing} mov.u32 %out, %a;", u32(1, 2), u32(1, 2))
        for nothing in (
            "bar.sync 0;",
            "barrier.sync 0;",
            "bar.warp.sync -1;",
            "membar.gl;",
            "fence.acq_rel.gpu;",
            "nanosleep.u32 20;",
            "griddepcontrol.wait;",
            "prefetch.global.L2 [%rd0];",
            "prefetchu.L1 [%rd0];",
            "createpolicy.fractional.L2::evict_first.b64 %rd9, 1.0;",
        )
    ),
]
CASES = [*INTEGER, *FLOATING, *APPROXIMATE, *CONVERSION_AND_CHOICE, *WARP_AND_MEMORY, *CONTROL]


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case.text.split()))
def test_an_instruction(case: Case) -> None:
    result = evaluate(case.text, case.expected.dtype.type, *case.inputs)
    assert result.tolist() == case.expected.tolist()


def test_trap_is_an_error_with_its_place() -> None:
    with pytest.raises(PtxError, match=r"program 0 thread 0: `trap` is reached"):
        evaluate("trap; mov.u32 %out, %a;", np.uint32, u32(1))


def test_seeds_of_float64_reciprocals() -> None:
    """``rcp.approx.ftz.f64`` reads and gives upper halves: 20 bits of mantissa, truncated; subnormals are zeros."""
    text = "rcp.approx.ftz.f64 %out, %a;"
    special = f64(1, 4, -math.inf, 0.0, -0.0, 2.0**-1040, 2.0**1023, math.nan)
    expected = f64(1, 0.25, -0.0, math.inf, -math.inf, math.inf, 0, math.nan)
    result = evaluate(text, np.float64, special)
    assert np.array_equal(result, expected, equal_nan=True)
    assert np.array_equal(np.signbit(result[:-1]), np.signbit(expected[:-1]))

    a = np.random.default_rng(0).uniform(1, 2, 500) * 2.0 ** np.arange(-250, 250)
    lower_bits = np.uint64(0xFFFFFFFF)
    exact, noisy = evaluate(text, np.float64, a), evaluate(text, np.float64, a, options=Options(noise=True))
    assert np.array_equal(exact, evaluate(text, np.float64, (a.view(np.uint64) | lower_bits).view(np.float64)))
    for result in (exact, noisy):
        assert not (result.view(np.uint64) & lower_bits).any()
        assert np.abs(result * a - 1).max() < 2.0**-18
    steps = (noisy.view(np.int64) >> 32) - (exact.view(np.int64) >> 32)
    assert set(steps.tolist()) == {-1, 0, 1}


def test_no_row_of_the_table_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    met, find = set(), registry.find

    def find_and_remember(kernel_name: str, ins: Instruction) -> registry.Entry:
        entry = find(kernel_name, ins)
        met.add((ins.opcode, entry))
        return entry

    monkeypatch.setattr(registry, "find", find_and_remember)
    for text, expected, inputs in CASES:
        evaluate(text, expected.dtype.type, *inputs)
    left_out = [(opcode, entry) for opcode, entry in registry.rows() if (opcode, entry) not in met]
    assert not left_out
