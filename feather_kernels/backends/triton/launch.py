"""Launches that cost the host little: a kernel that Triton has compiled is kept, and found again by what it depends on.

Triton's own launch looks at every argument and option to find the compiled kernel, which takes longer than the launch.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import TYPE_CHECKING, Any

import triton.compiler
from triton.runtime import driver

if TYPE_CHECKING:
    from torch import Tensor

COMPILE: dict[str, Any] = {"enable_fp_fusion": True}
"""Of every compilation: the bounds hold with a * b + c fused, which triton 3.10 leaves off unless asked."""

# where Triton has no such class, or launches return something else (its interpreter does), nothing is kept
COMPILED = getattr(triton.compiler, "CompiledKernel", ())


class Kernel:
    """A jit function, with what Triton compiled of it by device and form, for one driver: tests set others."""

    def __init__(self, function: Any) -> None:
        self.function = function
        self.driver: Any = None
        self.kept: dict[Hashable, Any] = {}

    def launch(self, programs: int, form: Hashable, *arguments: Any) -> None:
        """Launch so many programs on the current device, which is that of the first argument.

        ``form`` is what the compiled code depends on: dtypes of pointers, whether 16 divides those that are specialised
        by it (``aligned``), which are None, the width of integers, constants. ``arguments`` are all parameters, by
        position. A change of Triton's settings has no effect on forms that were launched before it.
        """
        key = arguments[0].device, form
        compiled = self.kept.get(key)
        if compiled is not None and self.driver is driver.active:
            compiled[programs, 1, 1](*arguments)
            return
        compiled = self.function[(programs,)](*arguments, **COMPILE)
        if isinstance(compiled, COMPILED):
            if self.driver is not driver.active:
                self.driver, self.kept = driver.active, {}
            self.kept[key] = compiled


def aligned(tensor: Tensor) -> bool:
    """Whether 16 divides the address, by which Triton compiles apart."""
    return tensor.data_ptr() % 16 == 0
