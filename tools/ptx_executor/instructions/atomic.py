"""``atom`` and ``red``: lanes that meet at one address take turns in a random (seeded) order (PTX ISA 9.7.13)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from tools.ptx_executor.errors import UnknownInstructionError
from tools.ptx_executor.instructions.movement import SPACES
from tools.ptx_executor.instructions.registry import CACHE_HINTS, MEMORY_ORDER, instruction
from tools.ptx_executor.lanes import Lanes
from tools.ptx_executor.parsing import Instruction, Operand
from tools.ptx_executor.scalar_types import UNSIGNED, Array, as_type, bits, flush_subnormals, join, split

Update = Callable[[Array, Array, Array], Array]  # (old, operand, swap value) -> new

OPERATIONS: dict[str, Update] = {
    "add": lambda old, b, _: old + b,
    "min": lambda old, b, _: np.minimum(old, b),
    "max": lambda old, b, _: np.maximum(old, b),
    "and": lambda old, b, _: old & b,
    "or": lambda old, b, _: old | b,
    "xor": lambda old, b, _: old ^ b,
    "exch": lambda _, b, __: b,
    "cas": lambda old, b, swap: np.where(old == b, swap, old),
    "inc": lambda old, b, _: np.where(old >= b, old.dtype.type(0), old + old.dtype.type(1)),
    "dec": lambda old, b, _: np.where((old == 0) | (old > b), b, old - old.dtype.type(1)),
}
TYPES = {"b16", "b32", "b64", "u32", "u64", "s32", "s64", "f16", "bf16", "f16x2", "bf16x2", "f32", "f64"}
FLOATS = {"f16", "bf16", "f16x2", "bf16x2", "f32", "f64"}
MODIFIERS = SPACES | MEMORY_ORDER | CACHE_HINTS | set(OPERATIONS) | {"noftz"}


@instruction("atom", types=TYPES, modifiers=MODIFIERS)
def atom(lanes: Lanes, ins: Instruction) -> Array:
    """Returns what was in memory before."""
    return _update(lanes, ins, ins.operands[1:])


@instruction("red", types=TYPES, modifiers=MODIFIERS)
def red(lanes: Lanes, ins: Instruction) -> None:
    _update(lanes, ins, ins.operands)


def _update(lanes: Lanes, ins: Instruction, operands: tuple[Operand, ...]) -> Array:
    name, width = ins.choose(*OPERATIONS), bits(ins.type)
    if ins.type in FLOATS and name != "add":
        raise UnknownInstructionError(f"kernel {lanes.threads.kernel.name}: .{name} on {ins.type} in `{ins.text}`")
    space, dtype, size = lanes.space(), UNSIGNED[width], width // 8
    addresses = lanes.addresses(operands[0])
    space.check(addresses, size, lanes, write=True)
    space.count(addresses, size, lanes, read=True, written=True)
    lanes.report_race(space, addresses, size, write=True, atomic=True)
    cells, index = space.cells(dtype), space.index(addresses, lanes, dtype)
    operand = np.broadcast_to(lanes.read_bits(operands[1], width), (lanes.count,))
    swap = np.broadcast_to(lanes.read_bits(operands[2], width), (lanes.count,)) if name == "cas" else operand
    order, first, turn = _turns(lanes, index)
    if name == "add" and ins.type not in FLOATS:
        return _add_integers(cells, index, operand, order, first)
    update = _typed(OPERATIONS[name], ins, flush=ins.type == "f32" and space.name == "global")
    old: Array = np.empty(lanes.count, dtype)
    by_turn = np.argsort(turn, kind="stable")
    for now in np.split(order[by_turn], np.cumsum(np.bincount(turn))[:-1]):
        old[now] = cells[index[now]]
        cells[index[now]] = update(old[now], operand[now], swap[now])
    return as_type(old, ins.type)


def _turns(lanes: Lanes, index: Array) -> tuple[Array, Array, Array]:
    """Lanes sorted by address in random order, where each address begins, and each lane's turn at its address."""
    shuffled = lanes.threads.rng.permutation(lanes.count)
    order = shuffled[np.argsort(index[shuffled], kind="stable")]
    begins = np.concatenate([[True], index[order][1:] != index[order][:-1]])
    first = np.maximum.accumulate(np.where(begins, np.arange(lanes.count), 0))
    return order, first, np.arange(lanes.count) - first


def _add_integers(cells: Array, index: Array, operand: Array, order: Array, first: Array) -> Array:
    """All turns at once: running sums, modulo the width."""
    total = np.cumsum(operand[order], dtype=operand.dtype)
    before = total - operand[order]
    old = np.empty_like(total)
    old[order] = cells[index[order]] + (before - before[first])
    last = np.concatenate([first[1:] != first[:-1], [True]])
    cells[index[order][last]] = old[order][last] + operand[order][last]
    return old


def _typed(operation: Update, ins: Instruction, *, flush: bool) -> Update:
    """An operation on raw bits that computes in the instruction's type; ``flush`` as ``atom.global.add.f32`` does."""

    def update(old: Array, b: Array, swap: Array) -> Array:
        if ins.type not in FLOATS:
            values = (as_type(raw, ins.type) for raw in (old, b, swap))
            return operation(*values).view(old.dtype)
        parts = [split(raw, ins.type) for raw in (old, b, swap)]
        results = [operation(*part) for part in zip(*parts, strict=True)]
        if flush:
            results = [flush_subnormals(result) for result in results]
        return join(results, ins.type).view(old.dtype)

    return update
