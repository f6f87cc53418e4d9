"""The straight-through gradient, scaled where the weight is pruned; out of place, as in backward."""

from __future__ import annotations

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
FLOAT32 = "float32"
FROM_BFLOAT16 = "bfloat16 to float32"
LIMIT = "torch.mul(g, w)"


@dataclass(frozen=True)
class Data:
    """Inputs and their gradients."""

    setting: Setting
    inputs: Inputs
    gradients: list[Tensor]
    grad_scale: Tensor

    @property
    def moved(self) -> int:
        """Bytes: read the gradient and the weight, write the scaled gradient."""
        return self.inputs.count * (8 + self.gradients[0].element_size())

    def gate(self, outputs: list[Tensor]) -> str | None:
        """Compare with the formula, exactly."""
        return gates.check_scaled(outputs, self.gradients, self.inputs.weights, self.inputs.threshold, GRAD_SCALE)


def trials(setting: Setting) -> Iterator[Trial]:
    """Float32 gradients, and bfloat16 gradients (autocast) to float32 ones."""
    for distribution, sparsity in grid(setting):
        yield float32_trial(setting, distribution, sparsity)
        yield from_bfloat16_trial(setting, distribution, sparsity)


def float32_trial(setting: Setting, distribution: str, sparsity: float) -> Trial:
    """The limit multiplies the gradients by the weights, which moves the same bytes."""
    with_peers = (distribution, sparsity) == PEER_INPUT
    variants: dict[str, Any] = {LIMIT: mul, **backends.ours(setting.device, ours, only_default=not with_peers)}
    if with_peers:
        variants |= {"paper": partial(peer, compile_it=False), "torch.compile": partial(peer, compile_it=True)}
    prepare = partial(prepare_gradients, setting, distribution, sparsity, torch.float32)
    return Trial(FLOAT32, distribution, sparsity, prepare, variants, LIMIT, setting.rounds(40))


def from_bfloat16_trial(setting: Setting, distribution: str, sparsity: float) -> Trial:
    """The limit is ``.to(float32)``, which need not read the weights."""
    variants: dict[str, Any] = {"to": to, **backends.ours(setting.device, ours, only_default=True)}
    prepare = partial(prepare_gradients, setting, distribution, sparsity, torch.bfloat16)
    return Trial(FROM_BFLOAT16, distribution, sparsity, prepare, variants, "to", setting.rounds(20))


def prepare_gradients(setting: Setting, distribution: str, sparsity: float, dtype: torch.dtype) -> Data:
    """Normal gradients of ``dtype``."""
    inputs = make_inputs(setting, distribution, sparsity)
    generator = torch.Generator(setting.device).manual_seed(1)
    gradients = [
        torch.randn(weight.shape, generator=generator, device=setting.device).to(dtype) for weight in inputs.weights
    ]
    return Data(setting, inputs, gradients, torch.tensor(GRAD_SCALE, device=setting.device))


def mul(data: Data) -> Variant:
    """Every gradient multiplied by its weight: ``torch.mul(gradient, weight)``."""

    def run() -> list[Tensor]:
        pairs = zip(data.gradients, data.inputs.weights, strict=True)
        return [torch.mul(gradient, weight) for gradient, weight in pairs]

    return Variant(run, data.moved, accept)


def ours(data: Data, backend: str) -> Variant:
    """``torch.ops.feather_kernels.scale_pruned_grad``."""
    operator, t = torch.ops.feather_kernels.scale_pruned_grad.default, data.inputs.threshold

    def run() -> list[Tensor]:
        pairs = zip(data.gradients, data.inputs.weights, strict=True)
        with fk.use_backend(backend):
            return [operator(gradient, weight, t, data.grad_scale) for gradient, weight in pairs]

    return Variant(run, data.moved, data.gate)


def peer(data: Data, compile_it: bool) -> Variant:
    """The paper's formula, which reads the mask that its forward has left behind."""
    masks = [(weight.abs() > data.inputs.threshold).float().view(-1) for weight in data.inputs.weights]
    form = bound(paper.scale_gradient, data.setting, compile_it, grad_scale=GRAD_SCALE)

    def run() -> list[Tensor]:
        return [form(gradient.view(-1), mask) for gradient, mask in zip(data.gradients, masks, strict=True)]

    return Variant(run, data.moved, data.gate)


def to(data: Data) -> Variant:
    """Every gradient converted."""

    def run() -> list[Tensor]:
        return [gradient.to(torch.float32) for gradient in data.gradients]

    return Variant(run, data.inputs.bytes * 3 // 2, accept)


CASE = Case("backward", trials)
