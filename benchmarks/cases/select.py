"""The global magnitude threshold's order statistics, from all weights together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import prune

import feather_kernels as fk
from benchmarks import backends, gates, paper
from benchmarks.case import Case, Setting, Trial, Variant, accept
from benchmarks.inputs import PEER_INPUT, Inputs, grid, make_inputs, make_weights, sort_magnitudes, with_threshold

DRIFT = 1e-3  # of a tensor's standard deviation: what an optimizer step moves a weight by
STEADY, COLD = " steady", " cold"


@dataclass(frozen=True)
class Data:
    """The weights after an optimizer step, and the order statistics of those before it."""

    inputs: Inputs
    hint: Tensor

    def gate(self, values: Tensor, count: int = 2) -> str | None:
        """Compare the bits with those from sorting."""
        return gates.check_values(values, self.inputs.values, count)


def trials(setting: Setting) -> Iterator[Trial]:
    """Steady is with the previous step's result as a hint, cold is without; peers know no hint."""
    for distribution, sparsity in grid(setting):
        with_peers = (distribution, sparsity) == PEER_INPUT
        variants: dict[str, Any] = {"sum": total}
        variants |= backends.ours(setting.device, partial(ours, steady=True), True, STEADY)
        variants |= backends.ours(setting.device, partial(ours, steady=False), not with_peers, COLD)
        if with_peers:
            variants |= {"paper": sort, "kthvalue": kthvalue, "topk": topk, "global_unstructured": global_unstructured}
        prepare = partial(prepare_drifted, setting, distribution, sparsity)
        yield Trial("float32", distribution, sparsity, prepare, variants, "sum", setting.rounds(40))


def prepare_drifted(setting: Setting, distribution: str, sparsity: float) -> Data:
    """The inputs after a small drift of every weight, with the hint from before it."""
    weights, ascending = drifted(distribution, setting)
    return Data(with_threshold(weights, ascending, sparsity), make_inputs(setting, distribution, sparsity).values)


@lru_cache(maxsize=1)
def drifted(distribution: str, setting: Setting) -> tuple[tuple[Tensor, ...], np.ndarray]:
    """Weights after an optimizer step, and their magnitudes, ascending."""
    generator = torch.Generator(setting.device).manual_seed(2)
    weights = tuple(
        weight + torch.randn(weight.shape, generator=generator, device=setting.device) * (DRIFT * weight.std())
        for weight in make_weights(distribution, setting)
    )
    return weights, sort_magnitudes(weights)


def total(data: Data) -> Variant:
    """The limit: every weight read once."""

    def run() -> None:
        for weight in data.inputs.weights:
            weight.sum()

    return Variant(run, data.inputs.bytes, accept)


def ours(data: Data, backend: str, steady: bool) -> Variant:
    """``torch.ops.feather_kernels.magnitude_select``."""
    weights, groups = list(data.inputs.weights), [0] * len(data.inputs.weights)
    hint = data.hint if steady else None

    def run() -> Tensor:
        with fk.use_backend(backend):
            return torch.ops.feather_kernels.magnitude_select.default(weights, groups, data.inputs.rank, hint=hint)

    return Variant(run, data.inputs.bytes, data.gate)


def sort(data: Data) -> Variant:
    """The paper's code: one buffer, a sort, the quantile read on the host; judged by T, which may round up."""

    def gate(t: float) -> str | None:
        low, high = data.inputs.values[0].tolist()
        return None if low <= t <= high else f"T = {t}, not in [{low}, {high}]"

    inputs = data.inputs
    return Variant(partial(paper.magnitude_threshold, inputs.weights, inputs.sparsity), inputs.bytes, gate)


def kthvalue(data: Data) -> Variant:
    """``torch.kthvalue`` of the concatenation: v[rank] alone."""
    rank = int(data.inputs.rank)
    return _of_magnitudes(data, lambda magnitudes: magnitudes.kthvalue(rank + 1).values)


def topk(data: Data) -> Variant:
    """``torch.topk`` of the concatenation: v[rank] alone, the smallest of the largest."""
    kept = data.inputs.count - int(data.inputs.rank)
    return _of_magnitudes(data, lambda magnitudes: magnitudes.topk(kept, sorted=False).values.amin())


def _of_magnitudes(data: Data, statistic: Callable[[Tensor], Tensor]) -> Variant:
    def run() -> Tensor:
        return statistic(torch.cat([weight.view(-1) for weight in data.inputs.weights]).abs_())

    return Variant(run, data.inputs.bytes, partial(data.gate, count=1))


def global_unstructured(data: Data) -> Variant:
    """``torch.nn.utils.prune.global_unstructured`` (L1): it makes masks and masked weights too."""
    names = [f"weight{index}" for index in range(len(data.inputs.weights))]
    amount = int(data.inputs.rank) + 1
    module = nn.Module()

    def restore() -> None:
        nonlocal module
        module = nn.Module()
        for name, weight in zip(names, data.inputs.weights, strict=True):
            module.register_parameter(name, nn.Parameter(weight, requires_grad=False))

    def run() -> list[Tensor]:
        prune.global_unstructured([(module, name) for name in names], prune.L1Unstructured, amount=amount)
        return [module.get_buffer(f"{name}_mask") for name in names]

    def gate(masks: list[Tensor]) -> str | None:
        pairs = zip(masks, data.inputs.weights, strict=True)
        wrong = (gates.check_mask(mask == 0, weight, data.inputs.threshold, exact=True) for mask, weight in pairs)
        return next((message for message in wrong if message is not None), None)

    return Variant(run, data.inputs.bytes, gate, restore)


CASE = Case("select", trials)
