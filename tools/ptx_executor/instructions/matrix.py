"""``ldmatrix`` and ``stmatrix`` of 8x8 matrices of 16-bit cells, which Triton also uses to change layouts."""

from __future__ import annotations

import numpy as np

from tools.ptx_executor.errors import ConvergenceError
from tools.ptx_executor.instructions.registry import instruction
from tools.ptx_executor.lanes import WARP_SIZE, Lanes
from tools.ptx_executor.parsing import Instruction, Vector
from tools.ptx_executor.scalar_types import Array

MODIFIERS = {"sync", "aligned", "m8n8", "x1", "x2", "x4", "trans", "shared"}
ROW_BYTES = 16


@instruction("ldmatrix", types={"b16"}, modifiers=MODIFIERS)
def load_matrix(lanes: Lanes, ins: Instruction) -> None:
    registers = ins.operands[0]
    for number, target in enumerate(registers.parts if isinstance(registers, Vector) else (registers,)):
        word = np.zeros(lanes.count, np.uint32)
        for half, index in enumerate(_cells(lanes, ins, 1, number, write=False)):
            cells = lanes.threads.shared_memory.cells(np.uint16)
            word |= cells[index].astype(np.uint32) << np.uint32(16 * half)
        lanes.write(target, word)


@instruction("stmatrix", types={"b16"}, modifiers=MODIFIERS)
def store_matrix(lanes: Lanes, ins: Instruction) -> None:
    registers = ins.operands[1]
    for number, source in enumerate(registers.parts if isinstance(registers, Vector) else (registers,)):
        word = lanes.read_full(source, "b32")
        for half, index in enumerate(_cells(lanes, ins, 0, number, write=True)):
            cells = lanes.threads.shared_memory.cells(np.uint16)
            cells[index] = (word >> np.uint32(16 * half)).astype(np.uint16)


def _cells(lanes: Lanes, ins: Instruction, address: int, number: int, *, write: bool) -> list[Array]:
    """Positions of the low and the high cell of each lane in matrix ``number``; lane 8 * number + r names row r."""
    if lanes.count % WARP_SIZE:
        raise lanes.fault(ConvergenceError, "needs whole warps", 0)
    memory, lane = lanes.threads.shared_memory, np.arange(lanes.count)
    first, inner = lane // WARP_SIZE * WARP_SIZE + 8 * number, lane % WARP_SIZE
    addresses = lanes.addresses(ins.operands[address])
    owners = first + inner % 8
    memory.check(addresses[owners], ROW_BYTES, lanes, write=write)
    cells = []
    for half in range(2):
        along, across = inner // 4, inner % 4 * 2 + half
        row, column = (across, along) if "trans" in ins.modifiers else (along, across)
        position = addresses[first + row] + 2 * column
        lanes.report_race(memory, position, 2, write=write, atomic=False)
        cells.append(memory.index(position, lanes, np.uint16))
    return cells
