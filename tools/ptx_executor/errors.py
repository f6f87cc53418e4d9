"""What the executor reports. Every fault names the kernel, the program, the thread, the instruction and the address."""

from __future__ import annotations


class PtxError(Exception):
    """Base of every error that the executor raises."""


class UnknownInstructionError(PtxError):
    """An opcode, modifier, type or directive that the executor does not implement; it is named in the message."""


class OutOfBoundsError(PtxError):
    """An executed access outside of every tensor that the kernel may touch, or outside of its shared memory."""


class MisalignedError(PtxError):
    """An access whose address is no multiple of its size (a vector access counts as one)."""


class DataRaceError(PtxError):
    """Two threads touch one address, one of them writes, no barrier orders them and they are not both atomic."""


class BarrierDeadlockError(PtxError):
    """Every thread that still lives waits at a barrier that cannot open."""


class ConvergenceError(PtxError):
    """A warp instruction reads a lane that does not execute it."""


class EndlessLoopError(PtxError):
    """The step limit was reached."""
