"""The number of pruned weights of each tensor."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import feather_kernels as fk
from benchmarks import backends
from benchmarks.case import Case, Setting, Trial, Variant, accept
from benchmarks.inputs import PEER_INPUT, Inputs, grid, make_inputs


def trials(setting: Setting) -> Iterator[Trial]:
    """Every input; the plain-PyTorch count on the peers'."""
    for distribution, sparsity in grid(setting):
        with_peers = (distribution, sparsity) == PEER_INPUT
        variants: dict[str, Any] = {"sum": total, **backends.ours(setting.device, ours, only_default=not with_peers)}
        if with_peers:
            variants["plain PyTorch"] = plain
        prepare = partial(make_inputs, setting, distribution, sparsity)
        yield Trial("float32", distribution, sparsity, prepare, variants, "sum", setting.rounds(40))


def total(inputs: Inputs) -> Variant:
    """The limit: every weight read once."""

    def run() -> None:
        for weight in inputs.weights:
            weight.sum()

    return Variant(run, inputs.bytes, accept)


def ours(inputs: Inputs, backend: str) -> Variant:
    """``torch.ops.feather_kernels.count_pruned``."""
    weights, thresholds = list(inputs.weights), [inputs.threshold] * len(inputs.weights)

    def run() -> Tensor:
        with fk.use_backend(backend):
            return torch.ops.feather_kernels.count_pruned.default(weights, thresholds)

    return Variant(run, inputs.bytes, partial(gate, inputs=inputs))


def plain(inputs: Inputs) -> Variant:
    """``(w.abs() <= t).sum()`` of each tensor."""

    def run() -> Tensor:
        return torch.stack([(weight.abs() <= inputs.threshold).sum() for weight in inputs.weights])

    return Variant(run, inputs.bytes, partial(gate, inputs=inputs))


def gate(counts: Tensor, inputs: Inputs) -> str | None:
    """The counts that numpy finds."""
    t = float(inputs.threshold)
    expected = [int((abs(weight.cpu().numpy()) <= t).sum()) for weight in inputs.weights]
    return None if counts.tolist() == expected else f"counts {counts.tolist()}, not {expected}"


CASE = Case("count", trials)
