"""Mutation test of the kernels' PTX: ``python tests/mutants.py [--backend cuda] [--each 8]`` (``make mutants``).

A mutant is a kernel with one instruction changed. It is killed when a call that launches the kernel raises a fault of
the executor or gives a result that the oracle refuses. Survivors are printed; docs/gpu.md explains them.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import math
import random
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import conftest
import oracle
import pytest
import samples
import torch
from ptx import execution
from ptx.errors import UnknownInstructionError
from ptx.execution import Program
from ptx.instructions.registry import find
from ptx.parsing import Address, Immediate, Instruction, Kernel, Negated, Operand, Register

import feather_kernels as fk
from feather_kernels.backends import resident
from feather_kernels.ops import dispatch

CPU = torch.device("cpu")
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
ULPS = {F16: 0.55, BF16: 0.55, F32: 2.0, F64: 4.0}
MOST_STEPS = 20_000  # of a launch: kernels take far fewer
GOAL = 0.9

# ---------------------------------------------------------------------------------------------- mutations

COMPARISONS = {"lt": "le", "le": "lt", "gt": "ge", "ge": "gt", "eq": "ne", "ne": "eq", "lo": "ls", "ls": "lo"}
COMPARISONS |= {"ltu": "leu", "leu": "ltu", "gtu": "geu", "geu": "gtu", "equ": "neu", "neu": "equ"}
OPCODES = {"add": "sub", "sub": "add", "min": "max", "max": "min", "and": "or", "or": "and", "shl": "shr", "shr": "shl"}
DELETED = ("bar", "barrier", "st", "red")


class Mutant(NamedTuple):
    """A change of one instruction of a program."""

    program: Program
    index: int
    change: Instruction

    def __str__(self) -> str:
        kernel = self.program.kernel
        return f"{kernel.name}[{self.index}]: `{kernel.instructions[self.index].text}`: {self.change.text}"

    def build(self) -> Program:
        """The program with the change."""
        mutated = copy.copy(self.program)
        code = list(self.program.kernel.instructions)
        code[self.index] = self.change
        mutated.kernel = dataclasses.replace(self.program.kernel, instructions=code)
        mutated.rules = list(self.program.rules)
        mutated.rules[self.index] = find(mutated.kernel.name, self.change).rule
        return mutated


def mutants_of(program: Program) -> Iterator[Mutant]:
    """Every mutant of a program that the executor understands."""
    for index, original in enumerate(program.kernel.instructions):
        for change in changes_of(original, program.kernel):
            try:
                find(program.kernel.name, change)
            except UnknownInstructionError:
                continue
            yield Mutant(program, index, change)


def changes_of(ins: Instruction, kernel: Kernel) -> Iterator[Instruction]:
    """Instructions in the place of one; ``text`` says what was changed."""
    for modifier in ins.modifiers & COMPARISONS.keys():
        if ins.opcode in ("setp", "set"):
            other = COMPARISONS[modifier]
            yield dataclasses.replace(
                ins, modifiers=ins.modifiers - {modifier} | {other}, text=f"{modifier} to {other}"
            )
    if ins.opcode in OPCODES:
        other = OPCODES[ins.opcode]
        yield dataclasses.replace(ins, opcode=other, text=f"{ins.opcode} to {other}")
    if ins.opcode == "mul":
        yield dataclasses.replace(ins, opcode="add", modifiers=ins.modifiers - {"lo"}, text="mul to add")
    if ins.opcode == "selp":
        first, a, b, *rest = ins.operands
        yield dataclasses.replace(ins, operands=(first, b, a, *rest), text="choices swapped")
    if ins.opcode in ("fma", "mad"):
        first, a, b, c = ins.operands
        yield dataclasses.replace(ins, operands=(first, a, c, b), text="factor and term swapped")
    if ins.opcode == "cvt" and "rn" in ins.modifiers:
        yield dataclasses.replace(ins, modifiers=ins.modifiers - {"rn"} | {"rz"}, text="rounded to zero")
    if ins.guard is not None:
        guard = ins.guard.register if isinstance(ins.guard, Negated) else Negated(ins.guard)
        yield dataclasses.replace(ins, guard=guard, text="guard negated")
    if ins.opcode in DELETED:
        yield from _nothing(ins, kernel)
    for place, operand in enumerate(ins.operands):
        changed = _changed_operand(ins, operand)
        if changed is not None:
            operands = (*ins.operands[:place], changed, *ins.operands[place + 1 :])
            yield dataclasses.replace(ins, operands=operands, text=f"operand {place} becomes {changed}")


def _nothing(ins: Instruction, kernel: Kernel) -> Iterator[Instruction]:
    register = next((Register(name, width) for name, width in kernel.registers.items() if width == 32), None)
    if register is not None:
        yield Instruction("mov.b32", "mov", frozenset(), ("b32",), (register, register), None, f"{ins.opcode} deleted")


def _changed_operand(ins: Instruction, operand: Operand) -> Operand | None:
    """A number or an offset that is one off; a float constant of twice or half the value."""
    if isinstance(operand, Address):
        moved = "param" not in ins.modifiers
        return dataclasses.replace(operand, offset=operand.offset + 4) if moved else None
    if isinstance(operand, Immediate) and ins.opcode not in ("bar", "barrier", "shfl"):
        bit = {0: 0, 32: 1 << 23, 64: 1 << 52}[operand.float_width]
        return dataclasses.replace(operand, value=operand.value ^ bit if bit else operand.value + 1)
    return None


# ---------------------------------------------------------------------------------------------- calls


def threshold(dtype: torch.dtype, out_dtype: torch.dtype, p: float) -> Callable[[], None]:
    def call() -> None:
        for value in (0.3, 0.0, math.nan):
            t = samples.scalar(value, dtype, CPU)
            for skipped in (0, 1):  # an aligned begin, and a head
                w = samples.boundary_weights(t, dtype, 60)[skipped:]
                out = torch.full((w.numel() + skipped,), 7.0, dtype=out_dtype)[skipped:]
                backend().threshold(w, t, p, out)
                assert oracle.ulp_error(out, oracle.threshold(w, t, p)) <= ULPS[out_dtype]

    return call


def scale(g_dtype: torch.dtype, dtype: torch.dtype, out_dtype: torch.dtype) -> Callable[[], None]:
    def call() -> None:
        for value in (0.3, 0.0):
            t, factor = samples.scalar(value, dtype, CPU), samples.scalar(0.37, dtype, CPU)
            for skipped in (0, 1):
                w = samples.boundary_weights(t, dtype, 60)[skipped:]
                g = samples.gradients(torch.empty(w.numel() + skipped), g_dtype)[skipped:]
                out = torch.full((w.numel() + skipped,), 7.0, dtype=out_dtype)[skipped:]
                backend().scale_pruned_grad(g, w, t, factor, out)
                exact = oracle.scaled_gradient(g, w, t, float(factor))
                assert oracle.ulp_error(out, exact) <= 0.55

    return call


def count(*dtypes: torch.dtype) -> Callable[[], None]:
    def call() -> None:
        ts = [samples.scalar(value, dtype, CPU) for value, dtype in zip((0.3, 0.0, 0.3), dtypes, strict=True)]
        weights = [samples.boundary_weights(t, dtype)[i:] for i, (t, dtype) in enumerate(zip(ts, dtypes, strict=True))]
        weights[2] = torch.cat([weights[2]] * 6)
        expected = [int(oracle.pruned(w, t).sum()) for w, t in zip(weights, ts, strict=True)]
        assert torch.ops.feather_kernels.count_pruned(weights, ts).tolist() == expected

    return call


def select(dtype: torch.dtype, *, scaled: bool = False, capped: bool = False, hinted: float = 0) -> Callable[[], None]:
    """hinted: as far off as this fraction of the hint; 0: none."""

    def call() -> None:
        generator = torch.Generator().manual_seed(0)
        weights = [torch.randn(n, generator=generator, dtype=F64).to(dtype)[1:] for n in (9001, 700, 65)]
        groups = [0, 1, 0]
        compute = samples.compute_dtype(dtype)
        scales = torch.tensor([1.0, 0.5, 3.0], dtype=compute) if scaled else None
        caps = torch.tensor([5000, 600, 30]) if capped else None
        for ranks in ([3000, 350], [4321, 0], [17, 550]):
            expected = []
            for group, rank in enumerate(ranks):
                members = [i for i, g in enumerate(groups) if g == group]
                parts = [oracle.scores(weights[i], None if scales is None else float(scales[i])) for i in members]
                limits = None if caps is None else [int(caps[i]) for i in members]
                expected.append(oracle.order_statistics(parts, rank, limits))
            exact = torch.stack(expected).reshape(2, 2)
            hint = exact.to(compute) * (1 + hinted) if hinted else None
            found = torch.ops.feather_kernels.magnitude_select(
                weights, groups, torch.tensor(ranks), scales=scales, caps=caps, hint=hint
            )
            assert found.double().equal(exact.double()), "order statistics"

    return call


def backend() -> Any:
    return dispatch.backend_for(CPU)


CALLS: dict[str, Callable[[], None]] = {
    **{f"threshold p={p}": threshold(F32, F32, p) for p in (1.0, 2.0, 3.0, math.inf, 4.5)},
    **{f"threshold {a} to {b}": threshold(a, b, 3.0) for a, b in ((F32, BF16), (BF16, BF16), (F64, F64), (F16, F32))},
    "scale": scale(F32, F32, F32),
    "scale bfloat16 to float32": scale(BF16, F32, F32),
    "scale bfloat16": scale(BF16, BF16, BF16),
    "scale float16 to float64": scale(F16, F64, F64),
    "count": count(F32, F32, F32),
    "count of mixed dtypes": count(BF16, F64, BF16),
    "select": select(F32),
    "select, scaled and capped": select(F32, scaled=True, capped=True),
    "select, hint": select(F32, hinted=1e-5),
    "select, hint that misses": select(F32, hinted=0.5),
    "select bfloat16": select(BF16),
    "select float64": select(F64),
}

# ---------------------------------------------------------------------------------------------- the test


class Substitution:
    """Launches of a program go to the mutant of it; ``launched`` has every program that was launched."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.launched: dict[Program, None] = {}
        self.mutant: tuple[Program, Program] | None = None
        launch = Program.launch

        def substituted(program: Program, *arguments: Any, **options: Any) -> Any:
            self.launched[program] = None
            chosen = self.mutant[1] if self.mutant is not None and self.mutant[0] is program else program
            return launch(chosen, *arguments, **options)

        patch.setattr(Program, "launch", substituted)

    def survives(self, mutant: Mutant, calls: list[str]) -> bool:
        """Whether every call is right with the mutant."""
        self.mutant = mutant.program, mutant.build()
        try:
            for call in calls:
                resident._kept.clear()  # a mutant may have written to a table
                CALLS[call]()
        except Exception:
            return False
        finally:
            self.mutant = None
            resident._kept.clear()
        return True


def executor(backend_name: str, architecture: int) -> AbstractContextManager[Any]:
    if backend_name == "cuda":
        from cuda_ptx import executed

        return executed(architecture)
    return conftest.ptx_executor(architecture)


def main() -> int:
    """Print the survivors and the score; 1 if too many survive."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--backend", choices=("cuda", "triton"), default="cuda")
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--each", type=int, default=8, help="mutants of a kernel, drawn by --seed")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    survivors, tried = [], 0
    with (
        pytest.MonkeyPatch.context() as patch,
        executor(options.backend, options.architecture),
        fk.use_backend(options.backend),
    ):
        patch.setattr(execution, "MAX_STEPS", MOST_STEPS)
        substitution = Substitution(patch)
        calls: dict[Program, list[str]] = {}
        for name, call in CALLS.items():
            substitution.launched.clear()
            call()
            for program in substitution.launched:
                calls.setdefault(program, []).append(name)
        for program, names in calls.items():
            every = list(mutants_of(program))
            drawn = random.Random(options.seed).sample(every, min(options.each, len(every)))
            left = [mutant for mutant in drawn if substitution.survives(mutant, names)]
            tried, survivors = tried + len(drawn), [*survivors, *left]
            print(f"{program.kernel.name}: {len(drawn) - len(left)} of {len(drawn)} killed", flush=True)
    print("\n".join(f"survivor: {mutant}" for mutant in survivors))
    killed = 1 - len(survivors) / tried
    print(f"{options.backend}: {killed:.1%} of {tried} mutants killed")
    return int(killed < GOAL)


if __name__ == "__main__":
    sys.exit(main())
