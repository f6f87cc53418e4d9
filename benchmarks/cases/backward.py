"""The straight-through gradient: scaled where the weight is pruned."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import feather_kernels as fk
from benchmarks import backends, gates, paper
from benchmarks.case import Case, Setting, Trial, Variant, accept
from benchmarks.compiled import bound
from benchmarks.inputs import PEER_INPUT, Inputs, grid, make_inputs

GRAD_SCALE = 0.5
IN_PLACE = "float32 in place"
NUMBER = "g.mul_(number)"
FROM_BFLOAT16 = "bfloat16 to float32"
LIMIT = "g.mul_(w)"


@dataclass(frozen=True)
class Data:
    """Inputs, their gradients, and a copy of those that the variants write to."""

    setting: Setting
    inputs: Inputs
    gradients: list[Tensor]
    written: list[Tensor]
    grad_scale: Tensor

    def restore(self) -> None:
        """Undo what a run has written: scaled again and again, gradients would become denormal."""
        torch._foreach_copy_(self.written, self.gradients)

    def gate(self, outputs: list[Tensor]) -> str | None:
        """Compare with the formula, exactly."""
        return gates.check_scaled(outputs, self.gradients, self.inputs.weights, self.inputs.threshold, GRAD_SCALE)


def trials(setting: Setting) -> Iterator[Trial]:
    """In place on float32 gradients, and from bfloat16 gradients (autocast) to new float32 ones."""
    for distribution, sparsity in grid(setting):
        yield in_place_trial(setting, distribution, sparsity)
        yield from_bfloat16_trial(setting, distribution, sparsity)


def in_place_trial(setting: Setting, distribution: str, sparsity: float) -> Trial:
    """Gradients overwritten; the limit multiplies them by the weights, which moves the same bytes."""
    with_peers = (distribution, sparsity) == PEER_INPUT
    variants: dict[str, Any] = {
        LIMIT: mul,
        NUMBER: mul_by_number,
        **backends.ours(setting.device, ours, only_default=not with_peers),
    }
    if with_peers:
        variants |= {"paper": partial(peer, compile_it=False), "torch.compile": partial(peer, compile_it=True)}
    prepare = partial(prepare_gradients, setting, distribution, sparsity, torch.float32)
    return Trial(IN_PLACE, distribution, sparsity, prepare, variants, LIMIT, setting.rounds(40))


def from_bfloat16_trial(setting: Setting, distribution: str, sparsity: float) -> Trial:
    """New float32 gradients; the limit is ``.to(float32)``."""
    ours = backends.ours(setting.device, ours_from_bfloat16, only_default=True)
    prepare = partial(prepare_gradients, setting, distribution, sparsity, torch.bfloat16)
    return Trial(FROM_BFLOAT16, distribution, sparsity, prepare, {"to": to, **ours}, "to", setting.rounds(20))


def prepare_gradients(setting: Setting, distribution: str, sparsity: float, dtype: torch.dtype) -> Data:
    """Normal gradients of ``dtype``."""
    inputs = make_inputs(setting, distribution, sparsity)
    generator = torch.Generator(setting.device).manual_seed(1)
    gradients = [
        torch.randn(weight.shape, generator=generator, device=setting.device).to(dtype) for weight in inputs.weights
    ]
    written = [gradient.clone() for gradient in gradients]
    return Data(setting, inputs, gradients, written, torch.tensor(GRAD_SCALE, device=setting.device))


def mul(data: Data) -> Variant:
    """Every gradient multiplied by its weight in place: ``gradient.mul_(weight)``."""

    def run() -> None:
        for gradient, weight in zip(data.written, data.inputs.weights, strict=True):
            gradient.mul_(weight)

    return Variant(run, 3 * data.inputs.bytes, accept, data.restore)


def mul_by_number(data: Data) -> Variant:
    """Every gradient multiplied in place by one number: two thirds of the bytes, since no weight is read."""

    def run() -> None:
        for gradient in data.written:
            gradient.mul_(data.grad_scale)

    return Variant(run, 2 * data.inputs.bytes, accept, data.restore)


def ours(data: Data, backend: str) -> Variant:
    """``torch.ops.feather_kernels.scale_pruned_grad``."""
    operator = torch.ops.feather_kernels.scale_pruned_grad.default

    def run() -> list[Tensor]:
        with fk.use_backend(backend):
            return [
                operator(gradient, weight, data.inputs.threshold, data.grad_scale)
                for gradient, weight in zip(data.written, data.inputs.weights, strict=True)
            ]

    return Variant(run, 3 * data.inputs.bytes, data.gate, data.restore)


def peer(data: Data, compile_it: bool) -> Variant:
    """The paper's formula, which reads the mask that its forward has left behind."""
    masks = [(weight.abs() > data.inputs.threshold).float().view(-1) for weight in data.inputs.weights]
    form = bound(paper.scale_gradient, data.setting, compile_it, grad_scale=GRAD_SCALE)

    def run() -> list[Tensor]:
        return [form(gradient.view(-1), mask) for gradient, mask in zip(data.written, masks, strict=True)]

    return Variant(run, 3 * data.inputs.bytes, data.gate, data.restore)


def to(data: Data) -> Variant:
    """Every gradient converted."""

    def run() -> list[Tensor]:
        return [gradient.to(torch.float32) for gradient in data.gradients]

    return Variant(run, data.inputs.bytes * 3 // 2, accept)


def ours_from_bfloat16(data: Data, backend: str) -> Variant:
    """``torch.ops.feather_kernels.scale_pruned_grad``, which reads the weights too."""
    operator = torch.ops.feather_kernels.scale_pruned_grad.default

    def run() -> list[Tensor]:
        with fk.use_backend(backend):
            return [
                operator(gradient, weight, data.inputs.threshold, data.grad_scale, out_dtype=torch.float32)
                for gradient, weight in zip(data.gradients, data.inputs.weights, strict=True)
            ]

    return Variant(run, math.ceil(data.inputs.bytes * 2.5), data.gate)


CASE = Case("backward", trials)
