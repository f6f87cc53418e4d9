"""The table of instructions: which opcode, with which modifiers and types, is executed by which function."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from tools.ptx_executor.errors import UnknownInstructionError
from tools.ptx_executor.lanes import Lanes
from tools.ptx_executor.parsing import Instruction, Kernel
from tools.ptx_executor.scalar_types import ALL_TYPES, Array

Rule = Callable[[Lanes, Instruction], "Array | None"]

CACHE_HINTS = frozenset(
    [f"L1::{p}" for p in ("evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate")]
    + [f"L2::{p}" for p in ("evict_normal", "evict_first", "evict_last", "cache_hint", "64B", "128B", "256B")]
    + ["ca", "cg", "cs", "lu", "cv", "wb", "wt", "nc"]
)
MEMORY_ORDER = frozenset(
    {"weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "sc", "cta", "gpu", "sys", "cluster"}
)


@dataclass(frozen=True)
class Entry:
    """One row: the opcode is understood with any subset of these modifiers and types."""

    rule: Rule
    modifiers: frozenset[str]
    types: frozenset[str]


_TABLE: dict[str, list[Entry]] = {}


def instruction(
    *opcodes: str, types: Iterable[str] = ALL_TYPES, modifiers: Iterable[str] = ()
) -> Callable[[Rule], Rule]:
    """Enter a function under opcodes; what it returns is written to the first operand."""

    def enter(rule: Rule) -> Rule:
        for opcode in opcodes:
            _TABLE.setdefault(opcode, []).append(Entry(rule, frozenset(modifiers), frozenset(types)))
        return rule

    return enter


def link(kernel: Kernel) -> list[Rule]:
    """The rule of every instruction of a kernel; raises UnknownInstructionError that names what is not understood."""
    return [find(kernel.name, instruction).rule for instruction in kernel.instructions]


def rows() -> list[tuple[str, Entry]]:
    """Every opcode with each of its rows."""
    return [(opcode, entry) for opcode, entries in _TABLE.items() for entry in entries]


def find(kernel_name: str, ins: Instruction) -> Entry:
    """The row of an instruction."""
    where = f"kernel {kernel_name}: `{ins.text}`"
    if ins.opcode not in _TABLE:
        raise UnknownInstructionError(f"{where}: opcode {ins.opcode} is not implemented")
    entries = _TABLE[ins.opcode]
    by_type = [entry for entry in entries if entry.types.issuperset(ins.types)]
    if not by_type:
        raise UnknownInstructionError(f"{where}: {ins.opcode} on {'.'.join(ins.types)} is not implemented")
    for entry in by_type:
        if entry.modifiers >= ins.modifiers:
            return entry
    unknown = sorted(ins.modifiers - by_type[0].modifiers)
    raise UnknownInstructionError(f"{where}: {ins.opcode} with modifier .{', .'.join(unknown)} is not implemented")
