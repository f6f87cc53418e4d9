"""Raw ops have no derivative: they raise where a gradient would be lost."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor, is_grad_enabled

_MESSAGE = (
    "torch.ops.feather_kernels.{} has no derivative and an argument requires grad: use feather_kernels.functional, or "
    "call it under torch.no_grad()"
)


def without_derivative(name: str, implementation: Callable) -> Callable:
    """The implementation of op ``name`` that notices, in grad mode, arguments that require grad.

    An op that returns a tensor then returns one whose backward raises, so that exported graphs run in grad mode. One
    that writes in place raises at once.
    """
    in_place = "." in name or name.endswith("_")

    @wraps(implementation)
    def run(*args: Any, **kwargs: Any) -> Any:
        if is_grad_enabled():
            differentiable = [tensor for tensor in _tensors(args, kwargs) if tensor.requires_grad]
            if differentiable and in_place:
                raise RuntimeError(_MESSAGE.format(name))
            if differentiable:
                return NoDerivative.apply(name, partial(implementation, *args, **kwargs), *differentiable)
        return implementation(*args, **kwargs)

    return run


class NoDerivative(torch.autograd.Function):
    """The result of ``run()``, with a backward that raises."""

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
