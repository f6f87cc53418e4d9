"""A PTX executor: runs compiled GPU code on CPU tensors with numpy. README.md says how to use it and what it checks.

Read the modules in this order: ``parsing`` (text to instructions), ``memory`` and ``races`` (the checks of an access),
``lanes`` (registers and threads), ``instructions`` (what each one does), ``execution`` (divergence and barriers),
``driver`` (Triton's JIT on top; apart from ``sample_kernels`` the only module that needs triton).
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
