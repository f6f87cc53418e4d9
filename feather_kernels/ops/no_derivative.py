"""Ops have no derivative: they raise an error instead of losing a gradient."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any, ParamSpec, TypeVar

import torch
from torch import Tensor, is_grad_enabled

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

_MESSAGE = (
    "torch.ops.feather_kernels.{} has no derivative and an argument requires grad: use feather_kernels.functional, or "
    "call it under torch.no_grad()"
)


def without_derivative(name: str, implementation: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Wrap the implementation of an op so that no gradient is lost silently.

    In grad mode, where an argument requires grad, an op that returns a tensor returns one whose backward raises, so
    that exported graphs run in grad mode. An op that writes in place raises at once.

    Args:
        name: the op's name, with its overload.
        implementation: the function that runs.
    """
    in_place = "." in name or name.endswith("_")

    @wraps(implementation)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        if is_grad_enabled():
            differentiable = [tensor for tensor in _tensors(args, kwargs) if tensor.requires_grad]
            if differentiable and in_place:
                raise RuntimeError(_MESSAGE.format(name))
            if differentiable:
                return NoDerivative.apply(name, partial(implementation, *args, **kwargs), *differentiable)
        return implementation(*args, **kwargs)

    return run


class NoDerivative(torch.autograd.Function):
    """Returns what ``run()`` returns, with a backward that raises."""

    @staticmethod
    def forward(ctx: Any, name: str, run: Callable[[], Tensor], *differentiable: Tensor) -> Tensor:  # noqa: ARG004
        """Run with grad mode off, as in any Function."""
        ctx.name = name
        return run()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:  # noqa: ARG004
        """Raise RuntimeError."""
        raise RuntimeError(_MESSAGE.format(ctx.name))


def _tensors(args: tuple[object, ...], kwargs: dict[str, object]) -> Iterator[Tensor]:
    for argument in (*args, *kwargs.values()):
        for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
            if isinstance(tensor, Tensor):
                yield tensor
