"""Fences and hints, which change no value here; branches and barriers, which execution.py carries out itself."""

from __future__ import annotations

import numpy as np

from tools.ptx_executor.errors import PtxError
from tools.ptx_executor.instructions.registry import instruction
from tools.ptx_executor.lanes import Lanes
from tools.ptx_executor.parsing import Instruction, Operand

BRANCHES = frozenset({"bra", "ret", "exit"})
WARP_OPCODES = frozenset({"shfl", "vote", "redux", "elect", "ldmatrix", "stmatrix", "bar"})


@instruction("bra", modifiers={"uni"})
@instruction("ret", "exit", modifiers={"uni"})
@instruction("bar", "barrier", modifiers={"sync", "arrive", "aligned", "cta"})
def flow(lanes: Lanes, ins: Instruction) -> None:
    """Entered in the table so that their modifiers are checked; never called."""
    raise AssertionError(f"`{ins.text}` is carried out by the scheduler")


@instruction("bar", modifiers={"warp", "sync"})
def synchronise_warp(lanes: Lanes, ins: Instruction) -> None:
    """Orders the accesses of the lanes of each warp, which arrive together."""
    warps = np.unique(lanes.of(lanes.threads.warp_row))
    lanes.threads.warp_epoch[warps] += 1


@instruction("membar", modifiers={"cta", "gl", "sys"})
@instruction("fence", modifiers={"sc", "acq_rel", "cta", "gpu", "sys", "cluster"})
@instruction("nanosleep", types={"u32"})
@instruction("griddepcontrol", modifiers={"launch_dependents", "wait"})
def nothing(lanes: Lanes, ins: Instruction) -> None:
    """Memory is sequentially consistent."""


@instruction("trap")
def trap(lanes: Lanes, ins: Instruction) -> None:
    raise lanes.fault(PtxError, "is reached", 0)


def is_barrier(ins: Instruction) -> bool:
    """Whether threads wait here for the rest of their program."""
    return ins.opcode in ("bar", "barrier") and "warp" not in ins.modifiers


def is_for_warp(ins: Instruction) -> bool:
    """Whether lanes wait here for others of their warp."""
    return "sync" in ins.modifiers and ins.opcode in WARP_OPCODES and not is_barrier(ins)


def mask_operand(ins: Instruction) -> Operand | None:
    """The lanes that must arrive at a warp instruction; None for all of the warp."""
    if ins.opcode == "bar":
        return ins.operands[0]
    return ins.operands[-1] if ins.opcode in ("shfl", "vote", "redux", "elect") else None
