"""Low-overhead launches: compiled kernels are cached under everything their code depends on.

Triton's own launch inspects every argument and option to find the compiled kernel, which takes longer than the launch.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import triton.compiler
from triton.runtime import driver

if TYPE_CHECKING:
    from torch import Tensor

COMPILE: dict[str, Any] = {"enable_fp_fusion": True}
"""Options of every compilation. The error bounds hold with a * b + c fused, which triton 3.10 does only on request."""

# where Triton has no such class, or launches return something else (its interpreter does), nothing is kept
COMPILED = getattr(triton.compiler, "CompiledKernel", ())


class Kernel:
    """A jit function with the kernels that Triton compiled from it.

    Attributes:
        function: the jit function.
        driver: Triton's driver that the kernels belong to; tests set other drivers.
        kept: the kernels by device and specialization.
    """

    def __init__(self, function: Any) -> None:
        self.function = function
        self.driver: Any = None
        self.kept: dict[Hashable, Any] = {}

    def launch(self, programs: int, specialization: Hashable, *arguments: Any) -> None:
        """Launch on the current device, which must be that of the first argument.

        A change of Triton's settings has no effect on specializations that were launched before it.

        Args:
            programs: number of programs to launch.
            specialization: all that the compiled code depends on: dtypes of pointers, the 16-byte
                alignment of those that Triton specializes on (``is_aligned``), which are None, the width of integers,
                constants.
            arguments: all parameters of the jit function, by position.
        """
        key = arguments[0].device, specialization
        compiled = self.kept.get(key)
        if compiled is not None and self.driver is driver.active:
            compiled[programs, 1, 1](*arguments)
            return
        compiled = self.function[(programs,)](*arguments, **COMPILE)
        if isinstance(compiled, COMPILED):
            if self.driver is not driver.active:
                self.driver, self.kept = driver.active, {}
            self.kept[key] = compiled


def is_aligned(tensor: Tensor) -> bool:
    """Return whether 16 divides the address, on which Triton specializes."""
    return tensor.data_ptr() % 16 == 0
