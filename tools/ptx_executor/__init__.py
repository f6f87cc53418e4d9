"""A PTX executor: compiled GPU code, run on CPU tensors with numpy.

Read in this order: ``parsing`` (text to instructions), ``memory`` and ``races`` (what an access is checked for),
``lanes`` (registers and threads), ``instructions`` (what each one does), ``execution`` (divergence and barriers),
``driver`` (Triton's JIT on top; the only module that needs triton).

It executes PTX, not SASS, and memory is sequentially consistent: a missing fence goes unseen, a missing barrier does
not. Nothing orders two programs of one launch, so a hand-over through a flag or a counter is reported as a race.
"""

from tools.ptx_executor.errors import (
    BarrierDeadlockError,
    ConvergenceError,
    DataRaceError,
    EndlessLoopError,
    MisalignedError,
    OutOfBoundsError,
    PtxError,
    UnknownInstructionError,
)
from tools.ptx_executor.execution import LaunchReport, Options, Program

__all__ = [
    "BarrierDeadlockError",
    "ConvergenceError",
    "DataRaceError",
    "EndlessLoopError",
    "LaunchReport",
    "MisalignedError",
    "Options",
    "OutOfBoundsError",
    "Program",
    "PtxError",
    "UnknownInstructionError",
]
