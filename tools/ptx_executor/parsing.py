"""PTX text to :class:`Kernel`: parameters, registers, shared variables, labels and typed instructions."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from tools.ptx_executor.errors import UnknownInstructionError
from tools.ptx_executor.scalar_types import ALL_TYPES, bits

IDENTIFIER = r"%?[A-Za-z_$][\w$@]*"
SPECIAL = re.compile(
    r"%(?:(?:tid|ntid|ctaid|nctaid|cluster_ctaid|cluster_nctaid)\.[xyz]|laneid|warpid|cluster_ctarank|clock|clock64|"
    r"globaltimer|lanemask_(?:eq|lt|le|gt|ge))$"
)
CONSTANT_NAMES = {"WARP_SZ": 32, "true": 1, "false": 0}


@dataclass(frozen=True)
class Register:
    """A virtual register; ``width`` in bits, 1 for a predicate."""

    name: str
    width: int


@dataclass(frozen=True)
class Immediate:
    """An integer constant, or the bits of a float constant of ``float_width`` bits (0 for integers)."""

    value: int
    float_width: int = 0


@dataclass(frozen=True)
class Special:
    """A special register such as ``%tid.x``."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """The name of a shared variable, a constant array, a parameter or a label."""

    name: str


@dataclass(frozen=True)
class Negated:
    """``!p``."""

    register: Register


@dataclass(frozen=True)
class Address:
    """``[base + offset]``; the offset in bytes."""

    base: Register | Symbol | Immediate
    offset: int


@dataclass(frozen=True)
class Vector:
    """``{a, b, ...}``."""

    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Pair:
    """``a|b``: two destinations."""

    first: Operand
    second: Operand


@dataclass(frozen=True)
class Sink:
    """``_``: a destination that is thrown away."""


Operand = Register | Immediate | Special | Symbol | Negated | Address | Vector | Pair | Sink


@dataclass(frozen=True)
class Instruction:
    """One instruction: ``@guard opcode.modifiers.types operands``; ``name`` is the opcode as it is written."""

    name: str
    opcode: str
    modifiers: frozenset[str]
    types: tuple[str, ...]
    operands: tuple[Operand, ...]
    guard: Register | Negated | None
    text: str

    @classmethod
    def named(
        cls, name: str, operands: tuple[Operand, ...], guard: Register | Negated | None, text: str
    ) -> Instruction:
        """The instruction with this opcode as it is written, taken apart."""
        opcode, *tokens = name.replace("::cta", "").split(".")
        modifiers, types = [t for t in tokens if t not in ALL_TYPES], [t for t in tokens if t in ALL_TYPES]
        return cls(name, opcode, frozenset(modifiers), tuple(types), operands, guard, text)

    @property
    def type(self) -> str:
        """The last type of the opcode."""
        return self.types[-1]

    def choose(self, *modifiers: str, default: str | None = None) -> str:
        """The one of ``modifiers`` that the opcode carries."""
        for modifier in modifiers:
            if modifier in self.modifiers:
                return modifier
        if default is None:
            raise UnknownInstructionError(f"`{self.text}` carries none of .{', .'.join(modifiers)}")
        return default


@dataclass(frozen=True)
class Parameter:
    """A kernel parameter: its size and its offset in the argument block, in bytes."""

    name: str
    size: int
    offset: int


@dataclass(frozen=True)
class SharedVariable:
    """A shared variable in bytes; size 0 is the dynamic one, which comes last."""

    alignment: int
    size: int


@dataclass
class Kernel:
    """One entry of a PTX module."""

    name: str
    parameters: list[Parameter]
    shared: dict[str, SharedVariable]
    constants: dict[str, bytes]
    registers: dict[str, int] = field(default_factory=dict)
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)


def parse(text: str, name: str | None = None) -> Kernel:
    """The entry ``name`` (the first one by default) of a PTX module.

    Raises UnknownInstructionError for a directive that is not understood and ValueError when the entry is absent.
    """
    text = re.sub(r"/\*.*?\*/", "", re.sub(r"//[^\n]*", "", text), flags=re.DOTALL)
    entries = {m[1]: m.end() for m in re.finditer(r"\.entry\s+([\w$]+)", text)}
    name = name or next(iter(entries), None)
    if name not in entries:
        raise ValueError(f"the module has entries {sorted(entries)}, got {name!r}")
    start = text.index("{", entries[name])
    kernel = Kernel(name, _parameters(text[entries[name] : start]), _shared(text), _constants(text))
    _Body(kernel).read(_matching_brace(text, start))
    return kernel


def _matching_brace(text: str, start: int) -> str:
    depth = 0
    for match in re.finditer(r"[{}]", text[start:]):
        depth += 1 if match[0] == "{" else -1
        if depth == 0:
            return text[start + 1 : start + match.start()]
    raise ValueError("the kernel's body is not closed")


def _parameters(head: str) -> list[Parameter]:
    listed = re.search(r"\((.*?)\)", head, re.DOTALL)
    parameters: list[Parameter] = []
    end = 0
    for declaration in listed[1].split(",") if listed else []:
        match = re.search(
            r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+).*?([\w$]+)(?:\[(\d+)\])?\s*$", declaration, re.DOTALL
        )
        if match is None:
            continue
        size = int(match[4]) if match[4] else bits(match[2]) // 8
        alignment = int(match[1] or size)
        offset = -(-end // alignment) * alignment
        parameters.append(Parameter(match[3], size, offset))
        end = offset + size
    return parameters


def _shared(text: str) -> dict[str, SharedVariable]:
    pattern = r"\.shared\s+\.align\s+(\d+)\s+\.(\w+)\s+([\w$]+)(\[(\d*)\])?\s*;"
    found = {}
    for match in re.finditer(pattern, text):
        count = int(match[5] or 0) if match[4] else 1
        found[match[3]] = SharedVariable(int(match[1]), count * bits(match[2]) // 8)
    return found


def _constants(text: str) -> dict[str, bytes]:
    pattern = r"\.(?:global|const)\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[\d+\]\s*=\s*\{([^}]*)\}"
    return {m[1]: bytes(int(value, 0) for value in m[2].split(",")) for m in re.finditer(pattern, text)}


class _Body:
    """Reads the statements of a body into a kernel; ``{`` at the start of a statement opens a register scope."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.scopes: list[dict[str, str]] = [{}]
        self.opened = 0

    def read(self, body: str) -> None:
        body = re.sub(r"^\s*\.loc\s[^\n;]*$", "", body, flags=re.MULTILINE)
        for statement in self._statements(body):
            if statement == "{":
                self.opened += 1
                self.scopes.append({})
            elif statement == "}":
                self.scopes.pop()
            else:
                self._statement(statement)

    @staticmethod
    def _statements(body: str) -> Iterator[str]:
        current, depth = "", 0
        for token in re.findall(r"[{};]|[^{};]+", body):
            if token == "{" and re.fullmatch(r"\s*(?:[$\w]+:\s*)*", current):
                if current.strip():
                    yield current.strip()
                yield "{"
                current = ""
            elif token == "}" and depth == 0:
                if current.strip():
                    yield current.strip()
                yield "}"
                current = ""
            elif token == ";":
                yield current.strip()
                current = ""
            else:
                depth += {"{": 1, "}": -1}.get(token, 0)
                current += token
        if current.strip():
            yield current.strip()

    def _statement(self, text: str) -> None:
        while label := re.match(r"([$\w]+):(?!:)\s*", text):
            self.kernel.labels[label[1]] = len(self.kernel.instructions)
            text = text[label.end() :]
        if text.startswith("."):
            self._directive(text)
        elif text:
            self._instruction(text)

    def _directive(self, text: str) -> None:
        match = re.match(r"\.reg\s+\.(\w+)\s+(.*)$", text, re.DOTALL)
        if match is None:
            if re.match(r"\.(?:loc|pragma|file|shared)\b", text):
                return
            raise UnknownInstructionError(f"kernel {self.kernel.name}: directive `{' '.join(text.split())[:80]}`")
        for declared in match[2].split(","):
            family = re.fullmatch(r"\s*(%?[\w$]+)<(\d+)>\s*", declared)
            names = [f"{family[1]}{i}" for i in range(int(family[2]))] if family else [declared.strip()]
            for name in names:
                unique = name if len(self.scopes) == 1 else f"{name}@{self.opened}"
                self.scopes[-1][name] = unique
                self.kernel.registers[unique] = bits(match[1])

    def _instruction(self, text: str) -> None:
        text = " ".join(text.split())
        match = re.fullmatch(r"(?:@(!?)(%?[\w$]+) )?([\w.:]+) ?(.*)", text)
        if match is None:
            raise UnknownInstructionError(f"kernel {self.kernel.name}: cannot read `{text}`")
        guard = self._operand(match[1] + match[2]) if match[2] else None
        if guard is not None and not isinstance(guard, (Register, Negated)):
            raise UnknownInstructionError(f"kernel {self.kernel.name}: guard of `{text}`")
        self.kernel.instructions.append(
            Instruction.named(
                match[3], tuple(self._operand(part) for part in split_operands(match[4])), guard=guard, text=text
            )
        )

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in split_operands(text.strip("{}"))))
        if text.startswith("["):
            return self._address(text)
        if "|" in text:
            first, second = text.split("|")
            return Pair(self._operand(first.strip()), self._operand(second.strip()))
        if text.startswith("!"):
            negated = self._operand(text[1:].strip())
            if not isinstance(negated, Register):
                raise UnknownInstructionError(f"kernel {self.kernel.name}: cannot negate `{text[1:]}`")
            return Negated(negated)
        return Sink() if text == "_" else self._scalar(text)

    def _scalar(self, text: str) -> Register | Immediate | Special | Symbol:
        for scope in reversed(self.scopes):
            if text in scope:
                return Register(scope[text], self.kernel.registers[scope[text]])
        if literal := re.fullmatch(r"0([fFdD])([0-9a-fA-F]+)", text):
            return Immediate(int(literal[2], 16), 32 if literal[1] in "fF" else 64)
        if text in CONSTANT_NAMES:
            return Immediate(CONSTANT_NAMES[text])
        if re.fullmatch(r"-?\d+\.\d*(?:[eE][-+]?\d+)?", text):
            return Immediate(int.from_bytes(struct.pack("<d", float(text)), "little"), 64)
        if re.match(r"-?\d", text):
            return Immediate(int(text.rstrip("U"), 0))
        if SPECIAL.match(text):
            return Special(text)
        if text.startswith("%") or not re.fullmatch(IDENTIFIER, text):
            raise UnknownInstructionError(f"kernel {self.kernel.name}: operand `{text}` is neither declared nor known")
        return Symbol(text)

    def _address(self, text: str) -> Address:
        match = re.fullmatch(r"\[\s*([%\w$]+)\s*(?:\+\s*(-?\w+)\s*)?\]", text)
        if match is None:
            raise UnknownInstructionError(f"kernel {self.kernel.name}: address `{text}`")
        base = self._scalar(match[1])
        if isinstance(base, Special):
            raise UnknownInstructionError(f"kernel {self.kernel.name}: address `{text}`")
        return Address(base, int(match[2], 0) if match[2] else 0)


def split_operands(text: str) -> list[str]:
    """Split at the commas that stand outside of braces and brackets."""
    parts, depth, current = [], 0, ""
    for token in re.findall(r"[{}\[\],]|[^{}\[\],]+", text):
        if token == "," and depth == 0:
            parts.append(current.strip())
            current = ""
            continue
        depth += (token in "{[") - (token in "]}")
        current += token
    return [*parts, current.strip()] if current.strip() else parts
