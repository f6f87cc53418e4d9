"""Moves, loads and stores (PTX ISA 9.7.9); every access is checked, counted and entered into the race shadow."""

from __future__ import annotations

import numpy as np

from tools.ptx_executor.errors import DataRaceError, UnknownInstructionError
from tools.ptx_executor.instructions.registry import CACHE_HINTS, MEMORY_ORDER, instruction
from tools.ptx_executor.lanes import Lanes
from tools.ptx_executor.parsing import Address, Immediate, Instruction, Operand, Symbol, Vector
from tools.ptx_executor.scalar_types import ALL_TYPES, PREDICATE, UNSIGNED, Array, as_type, bits

SPACES = {"global", "shared"}
VECTORS = {"v2", "v4", "v8"}
ACCESS = SPACES | VECTORS | CACHE_HINTS | MEMORY_ORDER
ORDERED = {"volatile", "relaxed", "acquire", "release", "sc"}
DATA_TYPES = ALL_TYPES - PREDICATE


@instruction("mov")
def mov(lanes: Lanes, ins: Instruction) -> Array | None:
    """A move, or packing and unpacking of a vector of equal parts."""
    destination, source = ins.operands
    width = bits(ins.type)
    if isinstance(destination, Vector):
        part, raw = width // len(destination.parts), lanes.read_bits(source, width)
        pieces = [(raw >> UNSIGNED[width](part * i)).astype(UNSIGNED[part]) for i in range(len(destination.parts))]
        for target, piece in zip(destination.parts, pieces, strict=True):
            lanes.write(target, piece)
        return None
    if isinstance(source, Vector):
        part = width // len(source.parts)
        whole: Array = np.zeros(1, UNSIGNED[width])
        for i, operand in enumerate(source.parts):
            whole = whole | lanes.read_bits(operand, part).astype(UNSIGNED[width]) << UNSIGNED[width](part * i)
        return whole
    return lanes.read(source, ins.type)


@instruction("ld", types=DATA_TYPES, modifiers={"param"} | VECTORS)
def load_parameter(lanes: Lanes, ins: Instruction) -> None:
    if "param" not in ins.modifiers:
        load(lanes, ins)
        return
    address = ins.operands[1]
    if not isinstance(address, Address) or not isinstance(address.base, Symbol):
        raise UnknownInstructionError(f"kernel {lanes.threads.kernel.name}: parameter of `{ins.text}`")
    offsets = {parameter.name: parameter.offset for parameter in lanes.threads.kernel.parameters}
    start, size = offsets[address.base.name] + address.offset, bits(ins.type) // 8
    for i, target in enumerate(_parts(ins.operands[0])):
        raw = lanes.threads.arguments[start + i * size : start + (i + 1) * size]
        lanes.write(target, as_type(raw.view(UNSIGNED[size * 8]), ins.type))


@instruction("ld", types=DATA_TYPES, modifiers=ACCESS)
def load(lanes: Lanes, ins: Instruction) -> None:
    space, dtype = lanes.space(), UNSIGNED[bits(ins.type)]
    targets, addresses = _parts(ins.operands[0]), lanes.addresses(ins.operands[1])
    size = len(targets) * bits(ins.type) // 8
    space.check(addresses, size, lanes, write=False)
    space.count(addresses, size, lanes, read=True, written=False)
    lanes.report_race(space, addresses, size, write=False, atomic=bool(ORDERED & ins.modifiers))
    cells, index = space.cells(dtype), space.index(addresses, lanes, dtype)
    for i, target in enumerate(targets):
        lanes.write(target, as_type(cells[index + i], ins.type))


@instruction("st", types=DATA_TYPES, modifiers=ACCESS)
def store(lanes: Lanes, ins: Instruction) -> None:
    space, dtype = lanes.space(), UNSIGNED[bits(ins.type)]
    addresses = lanes.addresses(ins.operands[0])
    values = [np.broadcast_to(lanes.read_bits(o, bits(ins.type)), (lanes.count,)) for o in _parts(ins.operands[1])]
    size = len(values) * bits(ins.type) // 8
    space.check(addresses, size, lanes, write=True)
    space.count(addresses, size, lanes, read=False, written=True)
    cells, index = space.cells(dtype), space.index(addresses, lanes, dtype)
    if space.shadow is not None:
        unchanged = np.logical_and.reduce([cells[index + i] == value for i, value in enumerate(values)])
        atomic = bool(ORDERED & ins.modifiers)
        lanes.report_race(space, addresses, size, write=True, atomic=atomic, unchanged=unchanged)
    for i, value in enumerate(values):
        cells[index + i] = value
    if space.shadow is not None:
        lost = np.logical_or.reduce([cells[index + i] != value for i, value in enumerate(values)])
        if lost.any():
            lane = int(np.argmax(lost))
            place = f"{space.name} address 0x{int(addresses[lane]):x}"
            raise lanes.fault(DataRaceError, f"races with itself: other threads store other values at {place}", lane)


@instruction("cp", modifiers={"async", "ca", "cg", "shared", "global", *CACHE_HINTS})
def copy_asynchronously(lanes: Lanes, ins: Instruction) -> None:
    """Global to shared memory, at once; ``cp.async dst, src, size[, source size]`` pads with zeros."""
    size_operand = ins.operands[2]
    if not isinstance(size_operand, Immediate):
        raise UnknownInstructionError(f"kernel {lanes.threads.kernel.name}: size of `{ins.text}`")
    size = size_operand.value
    target, source = lanes.addresses(ins.operands[0]), lanes.addresses(ins.operands[1])
    filled = np.full(lanes.count, size) if len(ins.operands) < 4 else lanes.read_full(ins.operands[3], "u32")
    shared = lanes.threads.shared_memory
    shared.check(target, size, lanes, write=True)
    lanes.report_race(shared, target, size, write=True, atomic=False)
    positions = shared.index(target, lanes, np.uint8)
    for byte in range(size):
        shared.data[positions + byte] = 0
    reading = np.nonzero(filled > 0)[0]
    if len(reading):
        if (filled[reading] != size).any():
            raise UnknownInstructionError(f"kernel {lanes.threads.kernel.name}: partial source of `{ins.text}`")
        inner, source = Lanes(lanes.threads, ins, lanes.positions[reading]), source[reading]
        memory = lanes.threads.global_memory
        memory.check(source, size, inner, write=False)
        memory.count(source, size, inner, read=True, written=False)
        inner.report_race(memory, source, size, write=False, atomic=False)
        cells, index = memory.cells(np.uint8), memory.index(source, inner, np.uint8)
        for byte in range(size):
            shared.data[positions[reading] + byte] = cells[index + byte]


@instruction("cp", modifiers={"async", "commit_group", "wait_group", "wait_all"})
def wait_for_copies(lanes: Lanes, ins: Instruction) -> None:
    """Copies are complete at once."""


@instruction("createpolicy", types={"b64"}, modifiers={"fractional", *CACHE_HINTS})
def create_policy(lanes: Lanes, ins: Instruction) -> Array:
    """Cache policies change no value."""
    return np.zeros(1, np.uint64)


@instruction("prefetch", "prefetchu", modifiers={"global", "L1", "L2", *CACHE_HINTS})
def prefetch(lanes: Lanes, ins: Instruction) -> None:
    """Prefetches change no value."""


def _parts(operand: Operand) -> tuple[Operand, ...]:
    return operand.parts if isinstance(operand, Vector) else (operand,)
