"""The forward: P(w) of all weights, written into existing tensors."""

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

FEATHER = 3.0
OTHER_POWERS = (1.0, 2.0, math.inf)
LIMIT = "copy_"


@dataclass(frozen=True)
class Data:
    """Inputs, and outputs that the variants share."""

    setting: Setting
    inputs: Inputs
    power: float
    outputs: list[Tensor]

    def poisoned(self) -> list[Tensor]:
        """The outputs, filled with NaN, so that no variant passes on another's result."""
        for output in self.outputs:
            output.fill_(math.nan)
        return self.outputs

    @property
    def moved(self) -> int:
        """Bytes read and written."""
        return self.inputs.bytes + self.inputs.count * self.outputs[0].element_size()

    def gate(self, outputs: list[Tensor], exact: bool) -> str | None:
        """Compare with P(w) in float64."""
        return gates.check_thresholded(outputs, self.inputs.weights, self.inputs.threshold, self.power, exact)


def trials(setting: Setting) -> Iterator[Trial]:
    """Both output dtypes on every input at Feather's power; the other powers on the peers' input."""
    for distribution, sparsity in grid(setting):
        for dtype in (torch.float32, torch.bfloat16):
            yield make_trial(setting, distribution, sparsity, FEATHER, dtype)
    for power in OTHER_POWERS:
        yield make_trial(setting, *PEER_INPUT, power, torch.float32)


def make_trial(setting: Setting, distribution: str, sparsity: float, power: float, dtype: torch.dtype) -> Trial:
    """One power, one output dtype, one input."""
    names = "float32" if dtype == torch.float32 else "float32 to bfloat16"
    with_peers = power == FEATHER and (distribution, sparsity) == PEER_INPUT
    variants: dict[str, Any] = {LIMIT: copy, **backends.ours(setting.device, ours, only_default=not with_peers)}
    if with_peers:
        variants |= {"paper": partial(peer, compile_it=False), "torch.compile": partial(peer, compile_it=True)}

    def prepare() -> Data:
        inputs = make_inputs(setting, distribution, sparsity)
        return Data(setting, inputs, power, [torch.empty_like(weight, dtype=dtype) for weight in inputs.weights])

    operation = f"{names}, p = {power:g}"
    return Trial(operation, distribution, sparsity, prepare, variants, LIMIT, setting.rounds(40))


def copy(data: Data) -> Variant:
    """The limit: a copy into the outputs, with their rounding."""

    def run() -> None:
        for weight, output in zip(data.inputs.weights, data.outputs, strict=True):
            output.copy_(weight)

    return Variant(run, data.moved, accept)


def ours(data: Data, backend: str) -> Variant:
    """``torch.ops.feather_kernels.threshold.out``."""
    outputs, t, operator = data.poisoned(), data.inputs.threshold, torch.ops.feather_kernels.threshold.out

    def run() -> list[Tensor]:
        with fk.use_backend(backend):
            for weight, output in zip(data.inputs.weights, outputs, strict=True):
                operator(weight, t, data.power, out=output)
        return outputs

    return Variant(run, data.moved, partial(data.gate, exact=True))


def peer(data: Data, compile_it: bool) -> Variant:
    """The paper's formula: a result of its own, and a mask, both kept as in training."""
    t, dtype = data.inputs.threshold, data.outputs[0].dtype
    form = bound(rounded, data.setting, compile_it, power=data.power, dtype=dtype)

    def run() -> list[tuple[Tensor, Tensor]]:
        return [form(weight.view(-1), t) for weight in data.inputs.weights]

    def gate(results: list[tuple[Tensor, Tensor]]) -> str | None:
        for weight, (_, mask) in zip(data.inputs.weights, results, strict=True):
            wrong = gates.check_mask(mask.view(weight.shape) == 0, weight, t, exact=False)
            if wrong is not None:
                return wrong
        return data.gate([value for value, _ in results], exact=False)

    return Variant(run, data.moved, gate)


def rounded(weight: Tensor, t: Tensor, power: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The paper's formula, its value converted to ``dtype``, and its mask."""
    value, mask = paper.threshold(weight, t, power)
    return value.to(dtype), mask


CASE = Case("threshold", trials)
