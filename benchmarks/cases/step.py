"""All of Feather's work in a training step: the threshold, and the forward and backward of every weight tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import feather_kernels as fk
from benchmarks import backends, gates, paper
from benchmarks.case import Case, Setting, Trial, Variant, accept
from benchmarks.cases import select
from benchmarks.compiled import bound
from benchmarks.inputs import DISTRIBUTIONS, Inputs, grid
from feather_kernels.quantile import interpolate

GRAD_SCALE = 0.5
POWER = 3.0
OPERATION = "float32, p = 3"
LIMIT = "copy_ + torch.mul(g, w) + sum"
# peers: every sparsity on one distribution, every distribution at one sparsity
PEER_DISTRIBUTION, PEER_SPARSITY = DISTRIBUTIONS[1], 0.9


@dataclass(frozen=True)
class Data:
    """Drifted weights with the hint of the step before, and gradients."""

    setting: Setting
    inputs: Inputs
    hint: Tensor
    gradients: list[Tensor]
    grad_scale: Tensor

    @property
    def moved(self) -> int:
        """Bytes: read w; read w, write P(w); read g and w, write the scaled g."""
        return 6 * self.inputs.bytes

    def gate(self, result: Any, exact: bool) -> str | None:
        """All values and all gradients."""
        values, gradients = result
        weights, t = self.inputs.weights, self.inputs.threshold
        wrong = gates.check_thresholded(values, weights, t, POWER, exact)
        return wrong or gates.check_scaled(gradients, self.gradients, weights, t, GRAD_SCALE, exact)


def trials(setting: Setting) -> Iterator[Trial]:
    """The limit moves the bytes of a copy, a multiplication and a sum of all weights."""
    for distribution, sparsity in grid(setting):
        with_peers = distribution == PEER_DISTRIBUTION or sparsity == PEER_SPARSITY
        variants: dict[str, Any] = {LIMIT: limit, **backends.ours(setting.device, ours, only_default=True)}
        if with_peers:
            variants |= {"paper": eager, "torch.compile": compiled_formula}
        prepare = partial(prepare_step, setting, distribution, sparsity)
        yield Trial(OPERATION, distribution, sparsity, prepare, variants, LIMIT, setting.rounds(20))


def prepare_step(setting: Setting, distribution: str, sparsity: float) -> Data:
    """Weights and hint as for the selection, normal gradients."""
    selected = select.prepare_drifted(setting, distribution, sparsity)
    generator = torch.Generator(setting.device).manual_seed(1)
    gradients = [
        torch.randn(weight.shape, generator=generator, device=setting.device) for weight in selected.inputs.weights
    ]
    grad_scale = torch.tensor(GRAD_SCALE, device=setting.device)
    return Data(setting, selected.inputs, selected.hint, gradients, grad_scale)


def limit(data: Data) -> Variant:
    """One plain op for each of the three parts."""
    outputs = [torch.empty_like(weight) for weight in data.inputs.weights]

    def run() -> list[Tensor]:
        for weight in data.inputs.weights:
            weight.sum()
        for weight, output in zip(data.inputs.weights, outputs, strict=True):
            output.copy_(weight)
        pairs = zip(data.gradients, data.inputs.weights, strict=True)
        return [torch.mul(gradient, weight) for gradient, weight in pairs]

    return Variant(run, 6 * data.inputs.bytes, accept)


def ours(data: Data, backend: str) -> Variant:
    """Select with the last step's hint; P(w) of each tensor, kept as until backward; gradients scaled."""
    ops, inputs = torch.ops.feather_kernels, data.inputs
    weights, groups = list(inputs.weights), [0] * len(inputs.weights)

    def run() -> tuple[list[Tensor], list[Tensor]]:
        with fk.use_backend(backend):
            t = interpolate(ops.magnitude_select(weights, groups, inputs.rank, hint=data.hint)[0], inputs.fraction)
            values = [ops.threshold(weight, t, POWER) for weight in weights]
            pairs = zip(data.gradients, weights, strict=True)
            gradients = [ops.scale_pruned_grad(gradient, weight, t, data.grad_scale) for gradient, weight in pairs]
        return values, gradients

    return Variant(run, data.moved, partial(data.gate, exact=True))


def eager(data: Data) -> Variant:
    """The paper's code: sort, eager formula, masks kept until backward."""
    select_threshold = partial(paper.magnitude_threshold, data.inputs.weights, data.inputs.sparsity)
    return _formula(data, select_threshold, compile_it=False)


def compiled_formula(data: Data) -> Variant:
    """The formula fused by inductor, forward and backward, with kthvalue for the threshold."""
    return _formula(data, select.kthvalue(select.Data(data.inputs, data.hint)).run, compile_it=True)


def _formula(data: Data, select_threshold: Callable[[], Any], compile_it: bool) -> Variant:
    forward = bound(paper.threshold, data.setting, compile_it, power=POWER)
    backward = bound(paper.scale_gradient, data.setting, compile_it, grad_scale=GRAD_SCALE)

    def run() -> tuple[list[Tensor], list[Tensor]]:
        t = select_threshold()
        results = [forward(weight.view(-1), t) for weight in data.inputs.weights]
        pairs = zip(data.gradients, results, strict=True)
        gradients = [backward(gradient.view(-1), mask) for gradient, (_, mask) in pairs]
        return [value for value, _ in results], gradients

    return Variant(run, data.moved, partial(data.gate, exact=False))


CASE = Case("step", trials)
