"""P(weight) as a tensor that refuses writes, returned by the attributes of ``weight_attribute``.

P(weight) is computed from the Parameter in each read, and a write to it would be lost: it raises and names the
Parameter. Like ``torch.nn.Parameter``, the classes have no ``__torch_function__`` of their own. So operations on them
cost as much as on plain tensors, return plain tensors, and take torch's fast paths.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, NoReturn, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, nn

from feather_kernels.torch_private import in_transform

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_IN_PLACE = r"[^_](.*[^_])?_|__setitem__|__i(add|sub|mul|truediv|floordiv|div|mod|pow|and|or|xor|[lr]shift)__"
_METHODS_THAT_VIEW = (
    *("__getitem__", "adjoint", "as_strided", "chunk", "detach", "diagonal", "dsplit", "expand", "expand_as"),
    *("flatten", "hsplit", "moveaxis", "movedim", "narrow", "permute", "ravel", "reshape", "reshape_as", "select"),
    *("split", "split_with_sizes", "squeeze", "swapaxes", "swapdims", "t", "tensor_split", "transpose", "unbind"),
    *("unflatten", "unfold", "unsqueeze", "view", "view_as", "vsplit"),
)
_PROPERTIES_THAT_VIEW = ("H", "T", "mH", "mT")


class ReadOnlyTensor(Tensor):
    """P(weight), or a view of it, that refuses writes; copies and pickles are plain tensors.

    It cannot notice writes by functions (``out=``, ``torch._foreach_*_``), or to views that functions have made
    (``torch.chunk``).

    Attributes:
        source: the layer, and the name of the Parameter from which P was computed.
    """

    __torch_function__ = nn.Parameter.__torch_function__  # disabled
    source: tuple[nn.Module, str]

    def refuse(self, what: str) -> NoReturn:
        """Raise RuntimeError, saying that ``what`` would be lost."""
        layer, name = self.source
        raise RuntimeError(
            f"{what} on {type(layer).__name__}.{name} would be lost: the attribute computes P(weight) in each read. "
            f"Use the Parameter, layer.latent({name!r}), or a .clone() of these values"
        )

    @property
    def data(self) -> Tensor:
        """The same memory without autograd; it refuses writes too."""
        return self._guard(super().data)

    @data.setter
    def data(self, _: Tensor) -> None:
        self.refuse("writing .data")

    @property
    def requires_grad(self) -> bool:
        """Whether P(weight) requires a gradient; can be set on the Parameter only."""
        return super().requires_grad

    @requires_grad.setter
    def requires_grad(self, _: bool) -> None:
        self.refuse("setting requires_grad")

    def _guard(self, result: Any) -> Any:
        """Make the result of a method read-only if it is a view of this tensor."""
        if isinstance(result, tuple | list):
            return type(result)(map(self._guard, result))
        if type(result) is Tensor and result.untyped_storage().data_ptr() == self.untyped_storage().data_ptr():
            return _read_only(result, ReadOnlyTensor, self.source)
        return result

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)


class ComputedWeight(ReadOnlyTensor):
    """P of a Parameter, as its attribute returns it; ``grad`` is the Parameter's."""

    @property
    def grad(self) -> Tensor | None:
        """The Parameter's gradient, or P's own after ``retain_grad()``."""
        return super().grad if self.retains_grad else self._parameter.grad

    @grad.setter
    def grad(self, grad: Tensor | None) -> None:
        self._parameter.grad = grad

    @property
    def _parameter(self) -> Tensor:
        layer, name = self.source
        return cast("Tensor", layer._parameters[name])

    def register_hook(self, hook: Any) -> NoReturn:  # noqa: ARG002
        """Refuse: the next read returns another tensor, without the hook."""
        self.refuse("register_hook()")

    register_post_accumulate_grad_hook = register_hook


def computed_weight(value: Tensor, layer: nn.Module, name: str) -> Tensor:
    """Make P of a layer's Parameter read-only, in place.

    Tensors of other classes (fake, sharded), and those inside torch.func, which have no storage, are returned as they
    are.

    Args:
        value: P of the Parameter.
        layer: the layer.
        name: name of the Parameter.
    """
    if type(value) is not Tensor or in_transform():
        return value
    return _read_only(value, ComputedWeight, (layer, name))


def _read_only(value: Tensor, kind: type[ReadOnlyTensor], source: tuple[nn.Module, str]) -> Tensor:
    value.__class__ = kind  # a view would add a node to the graph
    value.source = source  # type: ignore[attr-defined]
    return value


def _refusing(name: str) -> Callable[..., NoReturn]:
    def write(self: ReadOnlyTensor, *args: Any, **kwargs: Any) -> NoReturn:  # noqa: ARG001
        self.refuse(f"{name}()")

    return write


def _guarding(
    method: Callable[Concatenate[ReadOnlyTensor, Parameters], Result],
) -> Callable[Concatenate[ReadOnlyTensor, Parameters], Result]:
    @wraps(method)
    def view(self: ReadOnlyTensor, /, *args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        result = method(self, *args, **kwargs)
        return result if torch.compiler.is_compiling() else self._guard(result)

    return view


for _name in [name for name in dir(Tensor) if re.fullmatch(_IN_PLACE, name)]:
    setattr(ReadOnlyTensor, _name, _refusing(_name))
for _name in _METHODS_THAT_VIEW:
    setattr(ReadOnlyTensor, _name, _guarding(getattr(Tensor, _name)))
for _name in _PROPERTIES_THAT_VIEW:
    setattr(ReadOnlyTensor, _name, property(_guarding(getattr(Tensor, _name).__get__)))
