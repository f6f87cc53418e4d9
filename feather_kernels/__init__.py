"""Sparse training in PyTorch with Feather (BMVC 2023).

Feather computes with P(w), the weights under a thresholding operator, and scales the gradient of those that it prunes.
The threshold is one magnitude for all layers, which follows a schedule.

    sparsifier = feather_kernels.Sparsifier(model, sparsity=0.95, total_steps=len(loader) * epochs)
    ...                       # after every optimizer.step(): sparsifier.step()
    sparsifier.finalize()     # plain modules, zeros in the weights
"""

import importlib
from typing import TYPE_CHECKING, Any

from feather_kernels import functional, nn, ops
from feather_kernels._version import __version__
from feather_kernels.backends.registry import use_backend
from feather_kernels.errors import BackendUnavailableError, SparsityWarning

if TYPE_CHECKING:
    from feather_kernels.sparsify import (
        ConstantSchedule,
        CubicSchedule,
        LambdaSchedule,
        Report,
        Sparsifier,
    )

__all__ = [
    "BackendUnavailableError",
    "ConstantSchedule",
    "CubicSchedule",
    "LambdaSchedule",
    "Report",
    "Sparsifier",
    "SparsityWarning",
    "__version__",
    "functional",
    "nn",
    "ops",
    "use_backend",
]


def __getattr__(name: str) -> Any:
    """Import ``feather_kernels.sparsify`` when one of its names is first used: it takes half of the import time."""
    if name not in __all__ and name != "sparsify":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    sparsify = importlib.import_module("feather_kernels.sparsify")
    if name == "sparsify":
        return sparsify
    value = globals()[name] = getattr(sparsify, name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
