"""Which mutants an instruction has, and that planting one changes what runs and nothing else."""

from __future__ import annotations

import numpy as np
import pytest

from tools.ptx_executor import OutOfBoundsError, UnknownInstructionError, mutation
from tools.ptx_executor.execution import Program
from tools.ptx_executor.instructions.registry import Entry, find
from tools.ptx_executor.mutation import REMOVED, mutations, planted
from tools.ptx_executor.parsing import Instruction
from tools.ptx_executor.snippets import KERNEL


def program(body: str) -> Program:
    """A kernel of one address, in %rd0."""
    body = f"ld.param.u64 %rd0, [arg_0];\nmov.u32 %r1, %tid.x;\n{body}"
    return Program(KERNEL.format(parameters=".param .u64 arg_0", declarations="", body=body))


def mutants(line: str) -> set[str]:
    return {mutation.after for mutation in mutations(program(line))}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("add.s32 %r2, %r1, 7;", {"sub.s32 %r2, %r1, 7", "add.s32 %r2, %r1, 8"}),
        ("sub.s64 %rd2, %rd0, %rd1;", {"add.s64 %rd2, %rd0, %rd1", "sub.s64 %rd2, %rd1, %rd0"}),
        ("and.b32 %r2, %r1, 12;", {"or.b32 %r2, %r1, 12", "and.b32 %r2, %r1, 4"}),
        ("shl.b32 %r2, %r1, 3;", {"shr.b32 %r2, %r1, 3", "shl.b32 %r2, %r1, 4"}),
        ("min.s32 %r2, %r1, %r3;", {"max.s32 %r2, %r1, %r3"}),
        ("cvt.rn.bf16.f32 %h1, %r1;", {"cvt.rz.bf16.f32 %h1, %r1"}),
        ("fma.rn.f32 %r2, %r1, 0f3F000000, %r3;", {"fma.rn.f32 %r2, %r1, 0f3F800000, %r3"}),
        ("mul.f32 %r2, %r1, 0f00000000;", {"mul.f32 %r2, %r1, 0f3F800000"}),
        ("mul.f32 %r2, %r1, 0fFF800000;", {"mul.f32 %r2, %r1, 0f3F800000"}),
        ("and.b32 %r2, %r1, -12;", {"or.b32 %r2, %r1, -12", "and.b32 %r2, %r1, 2147483636"}),
        ("shr.s32 %r2, %r1, 3;", {"shl.b32 %r2, %r1, 3", "shr.s32 %r2, %r1, 4"}),
        (
            "setp.lt.s32 %p1, %r1, %r2;",
            {"setp.le.s32 %p1, %r1, %r2", "setp.ge.s32 %p1, %r1, %r2"},
        ),
        ("selp.b32 %r2, %r3, %r4, %p1;", {"selp.b32 %r2, %r4, %r3, %p1"}),
        ("ld.global.b32 %r2, [%rd0];", {REMOVED, "ld.global.b32 %r2, [%rd0+4]"}),
        (
            "ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd0];",
            {REMOVED, "ld.global.v4.b32 {%r2, %r3, %r4, %r5}, [%rd0+16]"},
        ),
        ("st.global.b64 [%rd0+8], %rd1;", {REMOVED, "st.global.b64 [%rd0+16], %rd1"}),
        ("@%p1 st.global.b32 [%rd0], 5;", {
            REMOVED, "@!%p1 st.global.b32 [%rd0], 5", "@%p1 st.global.b32 [%rd0+4], 5", "@%p1 st.global.b32 [%rd0], 6",
        }),
        ("bar.sync 0;", {REMOVED}),
        ("@!%p1 bra $done;\n$done:", {REMOVED, "@%p1 bra $done"}),
        ("bra.uni $done;\n$done:", set()),
        ("mov.u32 %r2, 5;", set()),
    ],
)  # fmt: skip
def test_mutants_of_an_instruction(line: str, expected: set[str]) -> None:
    assert mutants(line) == expected


def test_a_mutant_that_the_executor_cannot_run_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def find_no_sub(kernel: str, instruction: Instruction) -> Entry:
        if instruction.opcode == "sub":
            raise UnknownInstructionError("sub")
        return find(kernel, instruction)

    monkeypatch.setattr(mutation, "find", find_no_sub)
    assert mutants("add.s32 %r2, %r1, 7;") == {"add.s32 %r2, %r1, 8"}


def run(chosen: Program, array: np.ndarray) -> None:
    chosen.launch([1], [32], array.ctypes.data.to_bytes(8, "little"), [(array.ctypes.data, array.nbytes)])


def test_planting_changes_one_instruction_for_a_while() -> None:
    chosen = program(
        "mul.wide.u32 %rd1, %r1, 4;\nadd.s64 %rd1, %rd0, %rd1;\nadd.s32 %r2, %r1, 7;\nst.global.b32 [%rd1], %r2;"
    )
    by_text = {mutation.after: mutation for mutation in mutations(chosen)}
    lanes = np.arange(32, dtype=np.int32)

    def result() -> np.ndarray:
        array = np.zeros(32, np.int32)
        run(chosen, array)
        return array

    with planted(chosen, by_text["sub.s32 %r2, %r1, 7"]):
        assert (result() == lanes - 7).all()
    with planted(chosen, by_text["add.s32 %r2, %r1, 8"]):
        assert (result() == lanes + 8).all()
    with planted(chosen, by_text[REMOVED]):
        assert (result() == 0).all()
    with planted(chosen, by_text["st.global.b32 [%rd1+4], %r2"]), pytest.raises(OutOfBoundsError, match=r"\[%rd1\+4\]"):
        result()
    assert (result() == lanes + 7).all()


def test_a_negated_guard_turns_the_lanes_round() -> None:
    chosen = program(
        "mul.wide.u32 %rd1, %r1, 4;\nadd.s64 %rd1, %rd0, %rd1;\nsetp.lt.s32 %p1, %r1, 5;\n@%p1 st.global.b32 [%rd1], 1;"
    )
    negated = next(mutation for mutation in mutations(chosen) if mutation.after.startswith("@!"))
    array = np.zeros(32, np.int32)
    with planted(chosen, negated):
        run(chosen, array)
    assert (array == (np.arange(32) >= 5)).all()
