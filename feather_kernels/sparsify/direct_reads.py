"""Warns about operations on a prunable Parameter itself, which should use P of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from feather_kernels.torch_private import in_transform, is_innermost
from feather_kernels.user_warnings import warn_user

if TYPE_CHECKING:
    from feather_kernels.sparsify.prunable import WeightUse


class DirectReads(TorchFunctionMode):
    """Warns once per weight if a differentiable operation has the Parameter itself as an operand.

    Attributes and operations without a gradient (``weight.dtype``, ``weight.detach()``) do not count.

    Args:
        uses: all uses of the prunable weights.
    """

    def __init__(self, uses: Sequence[WeightUse]) -> None:
        super().__init__()
        self._uses = uses
        self._found: set[int] = set()
        self._by_parameter: dict[int, tuple[Tensor, WeightUse]] = {}

    def leave(self) -> None:
        """Stop looking; if another mode was entered and not left, this one stays on the stack, but does nothing."""
        if is_innermost(self):
            self.__exit__(None, None, None)
        self._by_parameter.clear()

    def begin(self) -> None:
        """Look for the Parameters that the layers hold now."""
        held = ((use.module._parameters.get(use.parameter_name), use) for use in self._uses)
        self._by_parameter = {id(p): (p, use) for p, use in held if p is not None and id(p) not in self._found}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if torch.compiler.is_compiling() or in_transform() or not torch.is_grad_enabled():
            return result
        if any(value.grad_fn is not None for value in _tensors([result])):
            for operand in _tensors([*args, *(kwargs or {}).values()]):
                found = self._by_parameter.get(id(operand))
                if found is not None and found[0] is operand:
                    self._warn(found[1], operand, getattr(func, "__name__", repr(func)))
        return result

    def _warn(self, use: WeightUse, parameter: Tensor, function: str) -> None:
        self._found.add(id(parameter))
        del self._by_parameter[id(parameter)]
        if function == "__get__":
            function = "an attribute such as .T"
        warn_user(
            f"{use.name} is a sparse layer, but here its Parameter itself is an operand of {function}, so that it "
            f"trains dense: call the layer; or name it in read_directly=[{use.layer_name!r}], so that its attribute "
            "returns the sparse weight; or leave it dense with ignore=[...]",
        )


def _tensors(values: Sequence[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from (item for item in value if isinstance(item, Tensor))
