"""Instructions between the lanes of a warp: shuffles, votes, reductions (PTX ISA 9.7.9, 9.7.13)."""

from __future__ import annotations

import numpy as np

from tools.ptx_executor.errors import ConvergenceError
from tools.ptx_executor.instructions.registry import instruction
from tools.ptx_executor.lanes import WARP_SIZE, Lanes
from tools.ptx_executor.parsing import Instruction, Pair
from tools.ptx_executor.scalar_types import Array

REDUCTIONS: dict[str, np.ufunc] = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@instruction("shfl", types={"b32"}, modifiers={"sync", "up", "down", "bfly", "idx"})
def shuffle(lanes: Lanes, ins: Instruction) -> None:
    """The value of another lane of the segment; lanes without a source keep theirs and get a false predicate."""
    values = lanes.read_full(ins.operands[1], "b32")
    offset, clamp, members = (lanes.read_full(operand, "u32").astype(np.int64) for operand in ins.operands[2:5])
    lane = lanes.of(lanes.threads.thread) % WARP_SIZE
    segment, limit = clamp >> 8 & 31, clamp & 31
    first = lane & segment
    last = first | limit & ~segment
    mode = ins.choose("up", "down", "bfly", "idx")
    sources = {"up": lane - offset, "down": lane + offset, "bfly": lane ^ offset, "idx": first | offset & ~segment & 31}
    valid = sources[mode] >= last if mode == "up" else sources[mode] <= last
    source = np.where(valid, sources[mode], lane)
    thread = lanes.positions - lane + source
    present = np.zeros(lanes.threads.count + WARP_SIZE, bool)
    present[lanes.positions] = True
    absent = ~present[thread] | (members >> source & 1 == 0)
    if absent.any():
        i = int(np.argmax(absent))
        raise lanes.fault(ConvergenceError, f"reads lane {int(source[i])}, which does not take part", i)
    everyone = np.zeros(lanes.threads.count, np.uint32)
    everyone[lanes.positions] = values
    target = ins.operands[0]
    if isinstance(target, Pair):
        lanes.write(target.second, valid)
        target = target.first
    lanes.write(target, everyone[thread])


def _warps(lanes: Lanes) -> tuple[Array, Array]:
    """The first lane of each warp present (lanes are in order), and which of these warps each lane belongs to."""
    warp = lanes.of(lanes.threads.warp_row)
    _, start, inverse = np.unique(warp, return_index=True, return_inverse=True)
    return start, inverse


def _ballot(lanes: Lanes, condition: Array) -> Array:
    bit = condition.astype(np.uint32) << (lanes.of(lanes.threads.thread) % WARP_SIZE).astype(np.uint32)
    start, inverse = _warps(lanes)
    return np.bitwise_or.reduceat(bit, start)[inverse]


def _require_members(lanes: Lanes, members: Array) -> Array:
    """All lanes of the mask must execute the instruction together; returns the mask."""
    missing = members & ~_ballot(lanes, np.ones(lanes.count, bool))
    if missing.any():
        i = int(np.argmax(missing != 0))
        raise lanes.fault(ConvergenceError, f"waits for lanes 0x{int(missing[i]):x}, which do not take part", i)
    return members


@instruction("vote", types={"pred", "b32"}, modifiers={"sync", "all", "any", "uni", "ballot"})
def vote(lanes: Lanes, ins: Instruction) -> Array:
    members = _require_members(lanes, lanes.read_full(ins.operands[2], "b32"))
    yes = _ballot(lanes, lanes.read_full(ins.operands[1], "pred")) & members
    results = {"ballot": yes, "all": yes == members, "any": yes != 0, "uni": (yes == members) | (yes == 0)}
    return results[ins.choose(*results)]


@instruction("redux", types={"u32", "s32", "b32"}, modifiers={"sync", *REDUCTIONS})
def reduce_warp(lanes: Lanes, ins: Instruction) -> Array:
    _require_members(lanes, lanes.read_full(ins.operands[2], "b32"))
    values = lanes.read_full(ins.operands[1], ins.type)
    start, inverse = _warps(lanes)
    return REDUCTIONS[ins.choose(*REDUCTIONS)].reduceat(values, start).astype(values.dtype)[inverse]


@instruction("activemask", types={"b32"})
def active_mask(lanes: Lanes, ins: Instruction) -> Array:
    return _ballot(lanes, np.ones(lanes.count, bool))


@instruction("elect", modifiers={"sync"})
def elect(lanes: Lanes, ins: Instruction) -> None:
    """The lowest lane of the mask becomes the leader."""
    members = _require_members(lanes, lanes.read_full(ins.operands[1], "b32"))
    leader = np.log2((members & (~members + np.uint32(1))).astype(np.float64)).astype(np.uint32)
    target = ins.operands[0]
    if isinstance(target, Pair):
        lanes.write(target.second, lanes.of(lanes.threads.thread) % WARP_SIZE == leader)
        target = target.first
    lanes.write(target, leader)
