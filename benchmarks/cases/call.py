"""The overhead of a call: a weight so small that the work on it hardly counts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.library import Library

import feather_kernels as fk
from benchmarks import backends, gates
from benchmarks.case import Case, Setting, Trial, Variant, accept

COUNT = 1024
CALLS = 200
POWER, GRAD_SCALE = 3.0, 0.5
FORWARD, BOTH = "forward, 1,024 weights", "forward and backward, 1,024 weights"
LIMIT = "empty Function"

_library = Library("feather_benchmarks", "DEF")
_library.define("empty(Tensor w, Tensor t) -> Tensor")
_library.impl("empty", lambda w, t: torch.empty_like(w), "CompositeExplicitAutograd")  # noqa: ARG005


class EmptyFunction(torch.autograd.Function):
    """The least that a differentiable op of a weight and a threshold costs in Python: it saves both and allocates."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, t: Tensor) -> Tensor:
        """A tensor like the weight, uninitialised."""
        ctx.save_for_backward(weight, t)
        return torch.ops.feather_benchmarks.empty.default(weight, t)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        """The gradient itself."""
        return gradient, None


@dataclass(frozen=True)
class Data:
    """A weight that requires grad, its threshold, a gradient."""

    weight: Tensor
    t: Tensor
    grad_scale: Tensor
    gradient: Tensor
    backward: bool

    def gate(self, result: Tensor) -> str | None:
        """P(w), or the weight's gradient."""
        if self.backward:
            return gates.check_scaled([result], [self.gradient], [self.weight.detach()], self.t, GRAD_SCALE)
        return gates.check_thresholded([result.detach()], [self.weight.detach()], self.t, POWER)


def trials(setting: Setting) -> Iterator[Trial]:
    """The forward alone, at grad_scale 1, and with its backward; the op without a Function in the former."""
    for operation in (FORWARD, BOTH):
        variants: dict[str, Any] = {LIMIT: empty, **backends.ours(setting.device, ours)}
        if operation == FORWARD:
            variants |= backends.ours(setting.device, ours_without_function, suffix=" op under no_grad")
        prepare = partial(prepare_call, setting, operation == BOTH)
        yield Trial(operation, "normal", None, prepare, variants, LIMIT, setting.rounds(60), 3.0, grad=True)


def prepare_call(setting: Setting, backward: bool) -> Data:
    """Normal weights, T = 1."""
    generator = torch.Generator(setting.device).manual_seed(4)
    weight, gradient = torch.randn(2, COUNT, generator=generator, device=setting.device).unbind()
    t, grad_scale = (torch.tensor(value, device=setting.device) for value in (1.0, GRAD_SCALE))
    return Data(weight.clone().requires_grad_(), t, grad_scale, gradient.clone(), backward)


def empty(data: Data) -> Variant:
    """The limit."""
    calls = _repeat(data, lambda: EmptyFunction.apply(data.weight, data.t))
    return Variant(calls, 8 * COUNT * CALLS, accept, calls=CALLS)


def ours(data: Data, backend: str) -> Variant:
    """``fk.functional.threshold``."""

    def call() -> Tensor:
        if data.backward:
            return fk.functional.threshold(data.weight, data.t, POWER, data.grad_scale)
        return fk.functional.threshold(data.weight, data.t)

    return _with_backend(_repeat(data, call), backend, data)


def ours_without_function(data: Data, backend: str) -> Variant:
    """``torch.ops.feather_kernels.threshold``."""
    operator, weight = torch.ops.feather_kernels.threshold.default, data.weight.detach()
    return _with_backend(_repeat(data, lambda: operator(weight, data.t, POWER)), backend, data)


def _with_backend(calls: Callable[[], Tensor], backend: str, data: Data) -> Variant:
    def run() -> Tensor:
        with fk.use_backend(backend):
            return calls()

    return Variant(run, 8 * COUNT * CALLS, data.gate, calls=CALLS)


def _repeat(data: Data, call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """``CALLS`` calls, with backward if the trial has it; returns the last result."""
    if data.backward:

        def once() -> Tensor:
            return torch.autograd.grad(call(), data.weight, data.gradient)[0]
    else:
        once = call

    def run() -> Tensor:
        for _ in range(CALLS):
            result = once()
        return result

    return run


CASE = Case("call", trials)
