"""One-instruction mutants of a compiled kernel: each is a mistake that a compiler, or its user, could have made.

    for mutation in mutations(program):
        with planted(program, mutation):
            ...  # a check of the kernel should fail here

Loads of parameters and moves of registers are left alone: without them nothing works, which proves nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from tools.ptx_executor import parsing as p
from tools.ptx_executor.errors import UnknownInstructionError
from tools.ptx_executor.execution import Program
from tools.ptx_executor.instructions.control import is_barrier
from tools.ptx_executor.instructions.registry import find
from tools.ptx_executor.scalar_types import bits

_OTHER_OPCODE = {
    "add": "sub", "sub": "add", "min": "max", "max": "min", "and": "or", "or": "and", "xor": "or", "shl": "shr",
    "shr": "shl", "abs": "neg", "neg": "abs",
}  # fmt: skip
_OTHER_COMPARISON = {
    "lt": ("le", "ge"), "le": ("lt", "gt"), "gt": ("ge", "le"), "ge": ("gt", "lt"), "eq": ("ne",), "ne": ("eq",),
    "lo": ("ls",), "ls": ("lo",), "hi": ("hs",), "hs": ("hi",),
    "ltu": ("leu",), "leu": ("ltu",), "gtu": ("geu",), "geu": ("gtu",), "equ": ("neu",), "neu": ("equ",),
}  # fmt: skip
_ORDER_MATTERS = frozenset({"sub", "selp", "div"})
_REMOVABLE = frozenset({"st", "atom", "red", "ld", "bar", "barrier"})
REMOVED = "(removed)"


@dataclass(frozen=True)
class Mutation:
    """The instruction at ``place`` of a kernel becomes another one, or nothing."""

    kernel: str
    place: int
    before: str
    mutant: p.Instruction

    @property
    def after(self) -> str:
        """The text of the mutant."""
        return self.mutant.text

    def __str__(self) -> str:
        return f"{self.kernel}: `{self.before}` -> `{self.after}`"


def mutations(program: Program) -> list[Mutation]:
    """Every mutant that the executor can run, in the order of the code."""
    name = program.kernel.name
    return [
        Mutation(name, place, instruction.text, mutant)
        for place, instruction in enumerate(program.kernel.instructions)
        if "param" not in instruction.modifiers and instruction.opcode != "mov"
        for mutant in _mutants(instruction)
        if mutant.text == REMOVED or _is_known(name, mutant)
    ]


@contextmanager
def planted(program: Program, mutation: Mutation) -> Iterator[None]:
    """``program`` with the mutation in place of its instruction."""
    code, rules, place = program.kernel.instructions, program.rules, mutation.place
    kept = code[place], rules[place]
    mutant = mutation.mutant
    code[place] = mutant
    rules[place] = _nothing if mutant.text == REMOVED else find(mutation.kernel, mutant).rule
    try:
        yield
    finally:
        code[place], rules[place] = kept


def _is_known(kernel: str, mutant: p.Instruction) -> bool:
    try:
        find(kernel, mutant)
    except UnknownInstructionError:
        return False
    return True


def _nothing(lanes: object, ins: p.Instruction) -> None:
    """The rule of an instruction that was removed."""


def _mutants(ins: p.Instruction) -> Iterator[p.Instruction]:
    for name in _other_names(ins):
        yield _rewritten(ins, name=name)
    if ins.guard is not None:
        yield _rewritten(ins, guard="!")
    if ins.guard is not None or ins.opcode in _REMOVABLE:
        yield p.Instruction.named("nop", (), None, REMOVED)
    if not is_barrier(ins) and ins.opcode != "bra":
        yield from _other_operands(ins)


def _other_names(ins: p.Instruction) -> Iterator[str]:
    opcode, *tokens = ins.name.split(".")
    if opcode in _OTHER_OPCODE:
        other = _OTHER_OPCODE[opcode]
        yield ".".join([other, *(f"b{token[1:]}" if other == "shl" else token for token in tokens)])
    for place, token in enumerate(tokens):
        others: tuple[str, ...] = ()
        if opcode in ("setp", "set"):
            others = _OTHER_COMPARISON.get(token, ())
        if opcode == "cvt" and token == "rn":
            others = ("rz",)
        for other in others:
            yield ".".join([opcode, *tokens[:place], other, *tokens[place + 1 :]])


def _other_operands(ins: p.Instruction) -> Iterator[p.Instruction]:
    """A constant that is another one, an address one access further on, two sources exchanged."""
    first = 0 if ins.opcode == "st" else 1  # behind the destination
    for place, operand in enumerate(ins.operands[first:], first):
        if isinstance(operand, p.Immediate):
            other = _other_constant(operand, bits(ins.type), is_mask=ins.opcode == "and")
            yield _rewritten(ins, operands={place: (other, _constant_text(other))})
        elif isinstance(operand, p.Address):
            step = bits(ins.type) // 8 * int(ins.choose("v2", "v4", default="v1")[1:])
            moved = replace(operand, offset=operand.offset + step)
            text = p.split_operands(_operands_text(ins))[place].strip("[]").split("+")[0].strip()
            yield _rewritten(ins, operands={place: (moved, f"[{text}+{moved.offset}]")})
    if ins.opcode in _ORDER_MATTERS and ins.operands[1] != ins.operands[2]:
        texts = p.split_operands(_operands_text(ins))
        yield _rewritten(ins, operands={1: (ins.operands[2], texts[2]), 2: (ins.operands[1], texts[1])})


def _other_constant(constant: p.Immediate, width: int, is_mask: bool) -> p.Immediate:
    """An integer one larger, a mask without its highest bit; a float twice as large, 1 for 0, infinity and NaN."""
    if not constant.float_width:
        value = constant.value & (1 << width) - 1
        return p.Immediate(value ^ 1 << value.bit_length() - 1 if is_mask and value else constant.value + 1)
    mantissa, one = {32: (23, 0x3F800000), 64: (52, 0x3FF0000000000000)}[constant.float_width]
    exponent = constant.value >> mantissa & (1 << constant.float_width - 1 - mantissa) - 1
    special = exponent in (0, (1 << constant.float_width - 1 - mantissa) - 1)
    return p.Immediate(one if special else constant.value + (1 << mantissa), constant.float_width)


def _constant_text(constant: p.Immediate) -> str:
    if not constant.float_width:
        return str(constant.value)
    return f"0{'f' if constant.float_width == 32 else 'd'}{constant.value:0{constant.float_width // 4}X}"


def _operands_text(ins: p.Instruction) -> str:
    return ins.text.partition(ins.name)[2].strip()


def _rewritten(
    ins: p.Instruction,
    name: str | None = None,
    guard: str = "",
    operands: dict[int, tuple[p.Operand, str]] | None = None,
) -> p.Instruction:
    """The instruction with another name, its guard negated, or other operands by their place."""
    changed, texts = list(ins.operands), p.split_operands(_operands_text(ins))
    for place, (operand, text) in (operands or {}).items():
        changed[place], texts[place] = operand, text
    own, condition = ins.guard, ins.text.partition(" ")[0] if ins.guard is not None else ""
    if guard:
        own = own.register if isinstance(own, p.Negated) else p.Negated(own) if own is not None else None
        condition = "@" + condition[2:] if condition[1] == "!" else "@!" + condition[1:]
    text = " ".join([*filter(None, [condition]), name or ins.name, ", ".join(texts)])
    return p.Instruction.named(name or ins.name, tuple(changed), own, text)
