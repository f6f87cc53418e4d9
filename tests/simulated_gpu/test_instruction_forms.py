"""A unit test for every form of an instruction in this package's compiled kernels; the last test shows it is complete.

A form is an opcode with its modifiers and types. One row of the executor's instruction table understands many forms;
this file has a case for each form in our kernels that tools/ptx_executor/tests/test_every_opcode.py does not use.
"""

from __future__ import annotations

import math
import os

import numpy as np
import pytest

from tools.ptx_executor import snippets
from tools.ptx_executor.execution import Program
from tools.ptx_executor.parsing import Instruction, parse
from tools.ptx_executor.scalar_types import Array
from tools.ptx_executor.snippets import evaluate
from tools.ptx_executor.tests.test_every_opcode import ALL, CASES, SHARED, Case, case, f32, f64, s32, u16, u32, u64

Form = tuple[str, frozenset[str], tuple[str, ...]]


def s64(*values: int) -> Array:
    return np.array(values, np.int64)


def pair(low: float, high: float) -> Array:
    """Two float32 in one element of 64 bits."""
    return f32(low, high).view(np.uint64)


EVEN = "and.b32 %r9, %r30, 1; setp.eq.u32 %p1, %r9, 0;"  # %p1: in even threads
INTEGER = [
    case("add.s32 %out, %a, %b;", s32(-(2**31), -2), s32(2**31 - 1, -5), s32(1, 3)),
    case("and.b16 %out, %a, %b;", u16(0b1000), u16(0b1100), u16(0b1010)),
    case("and.b64 %out, %a, %b;", u64(1 << 63 | 8), u64(1 << 63 | 12), u64(1 << 63 | 10)),
    case("or.b16 %out, %a, %b;", u16(0b1110), u16(0b1100), u16(0b1010)),
    case("or.b64 %out, %a, %b;", u64(1 << 63 | 14), u64(1 << 63 | 12), u64(10)),
    case("xor.b64 %out, %a, %b;", u64(1 << 63 | 6), u64(1 << 63 | 12), u64(10)),
    case("bfe.u32 %out, %a, 4, 8;", u32(0xFF, 0x12), u32(0xFF0, 0x123)),
    case("mad.lo.s32 %out, %a, -3, %b;", s32(-5, 2**31 - 5), s32(2, -(2**31) + 1), s32(1, -2)),
    case("mad.wide.s32 %out, %a, 8, %b;", s64(76, 2**34 - 8), s32(-3, 2**31 - 1), s64(100, 0)),
    case("mad.wide.u32 %out, %a, 8, %b;", u64(8 * ALL + 1), u32(ALL), u64(1)),
    case("max.s64 %out, %a, %b;", s64(1, -1), s64(1, -(2**63)), s64(-(2**40), -1)),
    case("max.u32 %out, %a, %b;", u32(ALL, 7), u32(ALL, 7), u32(1, 0)),
    case("min.s32 %out, %a, %b;", s32(-1, -(2**31)), s32(1, -(2**31)), s32(-1, 5)),
    case("min.s64 %out, %a, %b;", s64(-(2**40), -(2**63)), s64(1, -(2**63)), s64(-(2**40), -1)),
    case("min.u64 %out, %a, %b;", u64(1, 1 << 40), u64(1, 1 << 63), u64(1 << 63, 1 << 40)),
    case("mul.hi.u32 %out, %a, %b;", u32(ALL - 1, 1), u32(ALL, 1 << 31), u32(ALL, 2)),
    case("neg.s64 %out, %a;", s64(5, -(2**40), -(2**63)), s64(-5, 2**40, -(2**63))),
    case("shl.b16 %out, %a, %b;", u16(0xF800, 0), u16(0x1F00, 1), u32(3, 16)),
    case("shl.b64 %out, %a, %b;", u64(1 << 63, 0), u64(3, 3), u32(63, 64)),
    case("shr.u16 %out, %a, %b;", u16(0x0FFF, 0), u16(0xFFF0, 5), u32(4, 16)),
    case("shr.s64 %out, %a, %b;", s64(-2, -1), s64(-(2**60), -8), u32(59, 99)),
    case("shr.u32 %out, %a, %b;", u32(1, 0), u32(1 << 31, ALL), u32(31, 32)),
    case("shr.u64 %out, %a, %b;", u64(1, 0), u64(1 << 63, 5), u32(63, 64)),
    case("sub.s32 %out, %a, %b;", s32(2**31 - 1, 8), s32(-(2**31), 3), s32(1, -5)),
    case("sub.s64 %out, %a, %b;", s64(2**63 - 1, 8), s64(-(2**63), 3), s64(1, -5)),
]
FLOATING = [
    case("abs.bf16 %out, %a;", u16(0x3F80, 0x7F80, 0), u16(0xBF80, 0xFF80, 0x8000)),
    case("abs.bf16x2 %out, %a;", u32(0x3F804000), u32(0xBF80C000)),
    case("abs.ftz.f32 %out, %a;", f32(0, 2), f32(-1e-40, -2)),
    case("abs.f64 %out, %a;", f64(1.5, math.inf), f64(-1.5, -math.inf)),
    case("add.f64 %out, %a, %b;", f64(2**24 + 1, 2.0**53), f64(2**24, 2.0**53), f64(1, 1)),
    case("mul.f32 %out, %a, %b;", f32(1 + 2**-22, 1e-40), f32(1 + 2**-23, 1e-20), f32(1 + 2**-23, 1e-20)),
    case("mul.f64 %out, %a, %b;", f64(1 + 2**-22 + 2**-46), f64(1 + 2**-23), f64(1 + 2**-23)),
    case("sub.f32 %out, %a, %b;", f32(-1, 2**24), f32(1, 2**24), f32(2, 0.5)),
    case("sub.f64 %out, %a, %b;", f64(1 - 2**-40), f64(1), f64(2**-40)),
    case("neg.f64 %out, %a;", f64(-1.5, math.inf), f64(1.5, -math.inf)),
    case("min.f64 %out, %a, %b;", f64(1, 3), f64(2, math.nan), f64(1, 3)),
    case("sqrt.rn.f64 %out, %a;", f64(3, math.sqrt(2)), f64(9, 2)),
    case("rcp.approx.ftz.f64 %out, %a;", f64(0.25, -2), f64(4, -0.5)),
    case("rsqrt.approx.ftz.f32 %out, %a;", f32(0.5, math.inf), f32(4, 1e-40)),
    case("add.f32x2 %out, %a, %b;", pair(5, -1.5), pair(2, 0.5), pair(3, -2)),
    case("mul.f32x2 %out, %a, %b;", pair(6, -1), pair(2, 0.5), pair(3, -2)),
    case("sub.f32x2 %out, %a, %b;", pair(-1, 2.5), pair(2, 0.5), pair(3, -2)),
    case(
        "fma.rn.f32x2 %out, %a, %b, %c;",
        pair(7, -(2**-46)),
        pair(2, 1 + 2**-23),
        pair(3, 1 - 2**-23),
        pair(1, -1),
    ),
    case("sub.rn.f32.bf16 %out, %a, %b;", f32(1.5, 1 - 2**-20), u16(0x4000, 0x3F80), f32(0.5, 2**-20)),
]
CONVERSION = [
    case("cvt.u16.u32 %out, %a;", u16(0x1234), u32(0xABCD1234)),
    case("cvt.u16.u64 %out, %a;", u16(0x1234), u64(0xABCD << 32 | 0x1234)),
    case("cvt.f32.bf16 %out, %a;", f32(1, -2, math.inf), u16(0x3F80, 0xC000, 0x7F80)),
    case("cvt.rn.bf16.f32 %out, %a;", u16(0x3F80, 0x3F82, 0x7F80), f32(1 + 2**-8, 1 + 3 * 2**-8, 3.4e38)),
    case("cvt.rn.bf16x2.f32 %out, %a, %b;", u32(0x3F804000), f32(1 + 2**-8), f32(2)),
    case("cvt.f64.f32 %out, %a;", f64(float(np.float32(0.1)), 2.0**-149), f32(0.1, 2.0**-149)),
    case("cvt.rn.f32.f64 %out, %a;", f32(1, 1 + 2**-22, math.inf), f64(1 + 2**-24, 1 + 3 * 2**-24, 1e39)),
    case("cvt.rmi.f64.f64 %out, %a;", f64(1, -2, -1), f64(1.7, -1.2, -1)),
    case("cvt.rn.f64.s64 %out, %a;", f64(-3, 2.0**53), s64(-3, 2**53 + 1)),
    case("cvt.rzi.s64.f64 %out, %a;", s64(1, -1, 2**63 - 1), f64(1.7, -1.7, 1e30)),
    case("cvt.s64.s32 %out, %a;", s64(-1, 5), s32(-1, 5)),
    case("cvt.u32.u16 %out, %a;", u32(0xFFFF), u16(0xFFFF)),
    case("cvt.u32.u64 %out, %a;", u32(7), u64(1 << 40 | 7)),
    case("cvt.u64.u32 %out, %a;", u64(ALL), u32(ALL)),
]
THREE_WAYS = {"lt": (1, 0, 0), "le": (1, 1, 0), "eq": (0, 1, 0), "ne": (1, 0, 1), "ge": (0, 1, 1), "gt": (0, 0, 1)}
UNORDERED = {"nan": (0, 0, 0, 1), "geu": (0, 1, 1, 1)}
BF16 = u16(0xBF80, 0x8000, 0x3F80, 0x7FC0)  # -1, -0, 1, NaN
CHOICE = [
    *(
        case(f"setp.{name}.{kind} %p1, %a, %b; selp.u32 %out, 1, 0, %p1;", u32(*THREE_WAYS[name]), a, b)
        for kind, names, a, b in (
            ("b16", ("ne",), u16(1, 2, 3), u16(2, 2, 2)),
            ("b32", ("eq", "ne"), u32(1, 2, ALL), u32(2, 2, 2)),
            ("b64", ("eq", "ne"), u64(1, 2, 1 << 40 | 2), u64(2, 2, 2)),
            ("u32", ("lt",), u32(1, 2, ALL), u32(2, 2, 2)),
            ("s32", ("gt", "lt"), s32(-1, 0, 1), s32(0, 0, 0)),
            ("u64", ("gt",), u64(1, 2, 1 << 63), u64(2, 2, 2)),
            ("s64", ("gt", "lt", "le", "ge"), s64(-(2**40), 0, 2**40), s64(0, 0, 0)),
        )
        for name in names
    ),
    *(
        case(f"setp.{name}.{kind} %p1, %a, %b; selp.u32 %out, 1, 0, %p1;", u32(*holds), a, b)
        for kind, names, a, b in (
            ("bf16", ("lt", "nan"), BF16, u16(0, 0, 0, 0)),
            ("f32", ("lt", "nan", "gt", "le", "ge", "geu"), f32(-1, -0.0, 1, math.nan), f32(0, 0, 0, 0)),
            ("f64", ("lt", "nan", "gt", "le", "eq", "ne"), f64(-1, -0.0, 1, math.nan), f64(0, 0, 0, 0)),
        )
        for name in names
        for holds in [UNORDERED.get(name) or (*THREE_WAYS[name], 0)]
    ),
    *(
        case(
            f"setp.{name}.bf16x2 %p1|%p2, %a, %b; selp.u32 %r9, 1, 0, %p1; selp.u32 %r8, 2, 0, %p2;"
            "or.b32 %out, %r8, %r9;",
            u32(*holds),
            u32(0x3F804000, 0x40003F80, 0x3F807FC0),  # upper, lower: 1, 2; 2, 1; 1, NaN
            u32(0x40003F80, 0x3F804000, 0x40003F80),
        )
        for name, holds in {"lt": (2, 1, 2), "nan": (0, 0, 1)}.items()
    ),
    *(
        case(
            f"setp.gt.u32 %p1, %a, 1; setp.lt.u32 %p2, %a, 3; {text} selp.u32 %out, 1, 0, %p3;",
            u32(*holds),
            u32(1, 2, 3),
        )
        for text, holds in {
            "and.pred %p3, %p1, %p2;": (0, 1, 0),
            "or.pred %p3, %p1, %p2;": (1, 1, 1),
            "not.pred %p3, %p1;": (1, 0, 0),
        }.items()
    ),
    *(
        case(f"{EVEN} selp.{kind} %out, %a, %b, %p1;", number(1, 4), number(1, 2), number(3, 4))
        for kind, number in {"b16": u16, "b32": u32, "b64": u64, "f32": f32, "f64": f64}.items()
    ),
    *(
        case(f"mov.{kind} %out, %a;", number(1, 7), number(1, 7))
        for kind, number in {"b16": u16, "b32": u32, "u16": u16, "u64": u64}.items()
    ),
    case("bra.uni $L; mov.u32 %a, 9; $L: mov.u32 %out, %a;", u32(1, 2), u32(1, 2)),
]
REGISTERS = "{%r4, %r5, %r6, %r7}"
TRANSPOSE = (
    f"stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r3], {REGISTERS}; bar.warp.sync -1;"
    f"ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {REGISTERS}, [%r3]; bar.warp.sync -1;"
)
DIGITS = "mad.lo.u32 %r5, %r5, 10, %r4; mad.lo.u32 %r6, %r6, 100, %r5; mad.lo.u32 %out, %r7, 1000, %r6;"
FOUR, TWO = u32(1, 2, 3, 4), u64(1, 2)
FIRST_OF_4 = "and.b32 %r9, %r30, 3; setp.eq.u32 %p1, %r9, 0;"
WARP_AND_MEMORY = [  # 128 threads, one an element; the inputs repeat themselves; %rd0 is the address of %a
    case("redux.sync.add.s32 %out, %a, -1;", s32(-32, -32), s32(1, -3)),
    case("redux.sync.max.s32 %out, %a, -1;", s32(3, 3), s32(-5, 3)),
    case("redux.sync.min.s32 %out, %a, -1;", s32(-5, -5), s32(-5, 3)),
    case("redux.sync.max.u32 %out, %a, -1;", u32(ALL, ALL), u32(ALL, 3)),
    case("redux.sync.min.u32 %out, %a, -1;", u32(3, 3), u32(ALL, 3)),
    case("shfl.sync.up.b32 %out, %a, 1, 0, -1;", u32(8, 8, 9), u32(8, 9, 7)),
    case("atom.global.gpu.relaxed.min.s64 %rd9, [%rd0], -2; ld.global.u64 %out, [%rd0];", s64(-5, -2), s64(-5, 7)),
    case("atom.global.gpu.acq_rel.add.u64 %rd9, [%rd0], 1; ld.global.u64 %out, [%rd0];", u64(1 << 32), u64(ALL)),
    case("atom.global.gpu.relaxed.add.u64 %rd9, [%rd0], 1; ld.global.u64 %out, [%rd0];", u64(1 << 32, 8), u64(ALL, 7)),
    case("red.global.gpu.relaxed.add.u64 [%rd0], 1; ld.global.u64 %out, [%rd0];", u64(1 << 32, 8), u64(ALL, 7)),
    case(
        f"{SHARED} st.shared.b32 [%r3], %a; atom.relaxed.sys.shared.add.u32 %r9, [%r3], 1; ld.shared.b32 %r8, [%r3];"
        "mad.lo.u32 %out, %r9, 10, %r8;",
        u32(78, 12),
        u32(7, 1),
    ),
    *(
        case(
            f"ld.param.{kind} %rd9, [arg_0]; ld.param.u64 %rd10, [arg_0]; {same} sub.s64 %out, %rd9, %rd10;",
            s64(0),
            s64(1),
        )
        for kind, same in {
            "b64": "",
            "b32": "cvt.u32.u64 %r9, %rd10; cvt.u64.u32 %rd10, %r9;",
            "s32": "cvt.u32.u64 %r9, %rd10; cvt.s64.s32 %rd10, %r9;",
        }.items()
    ),
    case(
        f"{SHARED} st.shared.b32 [%r3], %a; atom.shared.add.u32 %r9, [%r3], 1; ld.shared.b32 %r8, [%r3];"
        "mad.lo.u32 %out, %r9, 10, %r8;",
        u32(78, 12),
        u32(7, 1),
    ),
    case(f"{SHARED} st.shared.b32 [%r3], %a; ld.shared.s32 %out, [%r3];", s64(-5, 7), s32(-5, 7)),
    case(  # transposed twice
        f"{SHARED} mov.u32 %r4, %a; add.u32 %r5, %a, 1; add.u32 %r6, %a, 2; add.u32 %r7, %a, 3;"
        f"{2 * TRANSPOSE} {DIGITS}",
        u32(4321, 5432),
        u32(1, 2),
    ),
    case("ld.global.b16 %out, [%rd0+2];", u16(0xABCD), u32(0xABCD1234)),
    case(f"and.b64 %rd9, %rd0, -16; ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%rd9]; {DIGITS}", u32(*[4321] * 4), FOUR),
    case("and.b64 %rd9, %rd0, -16; ld.global.v2.b64 {%rd10, %out}, [%rd9]; sub.s64 %out, %out, %rd10;", u64(1, 1), TWO),
    case(
        f"{FIRST_OF_4} mov.u32 %r4, 9; bar.sync 0; @%p1 st.global.v4.b32 [%rd0], {{%r4, %a, %r4, %a}}; bar.sync 0;"
        "ld.global.u32 %out, [%rd0];",
        u32(9, 1, 9, 1),
        FOUR,
    ),
    case(
        f"{EVEN} mov.u64 %rd9, 9; bar.sync 0; @%p1 st.global.v2.b64 [%rd0], {{%a, %rd9}}; bar.sync 0;"
        "ld.global.u64 %out, [%rd0];",
        u64(1, 9),
        TWO,
    ),
    case(
        f"{SHARED} mov.u32 %r8, 9; st.shared.v4.b32 [%r3], {{%a, %r8, %a, %a}};"
        f"ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r3]; {DIGITS}",
        u32(1191, 2292),
        u32(1, 2),
    ),
    case(
        f"{SHARED} mov.u64 %rd9, 9; st.shared.v2.b64 [%r3], {{%a, %rd9}}; ld.shared.v2.b64 {{%rd10, %rd11}}, [%r3];"
        "shl.b64 %rd10, %rd10, 8; or.b64 %out, %rd10, %rd11;",
        u64(1 << 48 | 9, 0x209),
        u64(1 << 40, 2),
    ),
    case(f"{SHARED} st.shared.b64 [%r3], %a; ld.shared.b64 %out, [%r3];", u64(1 << 63, 2), u64(1 << 63, 2)),
    case(f"{SHARED} st.shared.b32 [%r3], %a; ld.shared.b16 %out, [%r3+2];", u32(0xABCD), u32(0xABCD1234)),
    case(
        f"{SHARED} mov.u16 %h1, 7; st.shared.v2.b8 [%r3], {{%h1, %a}}; ld.shared.b16 %out, [%r3];",
        u16(0xCD07),
        u16(0xABCD),
    ),
    case(
        f"{SHARED} mov.u16 %h1, 7; st.shared.b16 [%r3], %a; st.shared.b16 [%r3+2], %h1;"
        "ld.shared.v2.b16 {%h2, %h3}, [%r3]; or.b16 %out, %h2, %h3;",
        u16(0x1207),
        u16(0x1200),
    ),
    case(f"{SHARED} st.shared.b8 [%r3+1], %a; ld.shared.b8 %out, [%r3+1];", u16(0xCD), u16(0xABCD)),
]
FORMS = [*INTEGER, *FLOATING, *CONVERSION, *CHOICE, *WARP_AND_MEMORY]


@pytest.mark.parametrize("case", FORMS, ids=lambda case: " ".join(case.text.split()))
def test_a_form(case: Case) -> None:
    result = evaluate(case.text, case.expected.dtype.type, *case.inputs)
    assert result.tolist() == case.expected.tolist()


def form(instruction: Instruction) -> Form:
    return instruction.opcode, instruction.modifiers, instruction.types


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize(
    "architecture", [90, *(pytest.param(other, marks=pytest.mark.slow) for other in (80, 100, 120))]
)
def test_no_compiled_form_is_left_out(architecture: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The frame around a case (``snippets``) counts too: what it loads and stores every result depends on."""
    pytest.importorskip("triton", reason="triton is not installed")
    from tests.simulated_gpu.test_triton_compiled import CALLS, compiled

    met: set[Form] = set()

    class Remembering(Program):
        def __init__(self, text: str, name: str | None = None) -> None:
            super().__init__(text, name)
            met.update(map(form, self.kernel.instructions))

    monkeypatch.setattr(snippets, "Program", Remembering)
    for text, expected, inputs in (*CASES, *FORMS):
        evaluate(text, expected.dtype.type, *inputs)
    left_out: dict[Form, str] = {}
    for call in CALLS.values():
        for loaded in compiled(call, architecture).loaded:
            for instruction in parse(loaded.files[".ptx"].read_text(), loaded.name).instructions:
                if form(instruction) not in met:
                    left_out.setdefault(form(instruction), f"{loaded.name}: {instruction.text}")
    assert not left_out
