"""What is pruned: per layer and in total, as text, Markdown, CSV or a dict."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor

from feather_kernels.nn.base import SparseLayer
from feather_kernels.sparsify.policies import Policy
from feather_kernels.sparsify.selection import PrunableWeight, SkippedLayer

COLUMNS = ("layer", "shape", "numel", "zeros", "sparsity", "threshold", "ties", "backward")


@dataclass(frozen=True)
class LayerReport:
    """One prunable weight.

    ``zeros`` counts the entries of P(weight) that the operator makes zero (at T = 0: that are zero). ``ties`` counts
    those among them that are zero only because their magnitude equals that of the last weight the budget asked for;
    the budget is given to the layers in their order. ``backward`` says whether the layer's backward pass computes
    P(weight) again ("recomputes", which holds no copy of the weight) or keeps it from the forward pass ("keeps"), where
    autocast is off. ``kept_bytes`` is what the layer holds more than a dense one from forward to backward then;
    ``lean`` whether recompute=True would make that nothing.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    zeros: int
    threshold: float
    ties: int
    backward: str
    kept_bytes: int
    lean: bool

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / self.numel if self.numel else 0.0

    @property
    def empty(self) -> bool:
        """Whether no weight is left."""
        return 0 < self.numel == self.zeros

    def row(self) -> tuple[str, ...]:
        """The columns of ``COLUMNS`` as text."""
        shape = "x".join(map(str, self.shape))
        numbers = f"{self.sparsity:.4%}", f"{self.threshold:.6g}", str(self.ties), self.backward
        return self.name, shape, str(self.numel), str(self.zeros), *numbers


@dataclass(frozen=True)
class Report:
    """State of a sparsified model; ``str()`` is a table."""

    step: int
    target_sparsity: float
    layers: tuple[LayerReport, ...]
    skipped: tuple[SkippedLayer, ...]
    model_parameters: int
    budget: int

    @property
    def numel(self) -> int:
        """Number of prunable weights."""
        return sum(layer.numel for layer in self.layers)

    @property
    def zeros(self) -> int:
        """Number of zeros among the prunable weights."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def ties(self) -> int:
        """Zeros beyond the budget (``floor((numel - 1) target) + 1`` in the global scope), due to equal magnitudes."""
        return sum(layer.ties for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the prunable weights."""
        return self.zeros / self.numel

    @property
    def kept_bytes(self) -> int:
        """Bytes of P(weight) that are held from forward to backward, and that a dense model does not hold."""
        return sum(layer.kept_bytes for layer in self.layers)

    @property
    def model_sparsity(self) -> float:
        """The same zeros as a fraction of all parameters of the model (biases, norms, skipped layers included)."""
        return self.zeros / self.model_parameters

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        totals = ("numel", "zeros", "sparsity", "ties", "model_sparsity", "kept_bytes")
        return {
            "step": self.step,
            "target_sparsity": self.target_sparsity,
            "model_parameters": self.model_parameters,
            **{name: getattr(self, name) for name in totals},
            "layers": [
                {**asdict(layer), "shape": list(layer.shape), "sparsity": layer.sparsity} for layer in self.layers
            ],
            "skipped": [asdict(layer) for layer in self.skipped],
        }

    def to_csv(self) -> str:
        """One line per prunable weight, with a header; numbers unrounded."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            numbers = layer.numel, layer.zeros, layer.sparsity, layer.threshold, layer.ties
            writer.writerow((layer.name, shape, *numbers, layer.backward))
        return text.getvalue()

    def to_markdown(self) -> str:
        """A Markdown table, the totals, and the skipped layers."""
        lines = [" | ".join(COLUMNS), " | ".join(["---", "---", *["---:"] * (len(COLUMNS) - 3), "---"])]
        lines += [" | ".join(layer.row()) for layer in self.layers]
        lines = [f"| {line} |" for line in lines] + ["", *self._totals()]
        if self.skipped:
            lines += ["", "Left dense:", "", *(f"- `{layer.name}`: {layer.reason}" for layer in self.skipped)]
        return "\n".join(lines)

    def __str__(self) -> str:
        rows = [COLUMNS, *(layer.row() for layer in self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if i in (0, 1, 7) else cell.rjust(width) for i, (cell, width) in enumerate(zipped)
            )
            for zipped in (list(zip(row, widths, strict=True)) for row in rows)
        ]
        lines.insert(1, "-" * len(lines[0]))
        lines += ["", *self._totals()]
        lines += [f"left dense: {layer.name}: {layer.reason}" for layer in self.skipped]
        return "\n".join(lines)

    def _totals(self) -> list[str]:
        ties = f", {self.ties} of them ties" if self.ties else ""
        return [
            f"{self.zeros:,} of {self.numel:,} prunable weights are zero{ties}: sparsity {self.sparsity:.4%} "
            f"(target {self.target_sparsity:.4%} at step {self.step})",
            f"{self.model_sparsity:.4%} of all {self.model_parameters:,} parameters",
            self._memory(),
        ]

    def _memory(self) -> str:
        """One line: bytes of P(weight) from forward to backward, and what recompute would change about them."""
        held = f"P(w) holds {self.kept_bytes / 1e6:,.1f} MB more than a dense model from forward to backward"
        leanest = sum(layer.kept_bytes for layer in self.layers if not layer.lean)
        if leanest < self.kept_bytes:
            return f"{held}; {leanest / 1e6:,.1f} MB with recompute=True, which computes it twice"
        return held


@torch.no_grad()
def measure_layers(weights: Sequence[PrunableWeight], policy: Policy, sparsity: float) -> list[LayerReport]:
    """Reports of all weights under their thresholds, ties against the policy's budget at ``sparsity``."""
    parameters = [weight.parameter for weight in weights]
    thresholds = [weight.uses[0].binding.value for weight in weights]
    scales = policy.scales(parameters)
    factors: Sequence[Tensor | float] = [1.0] * len(weights) if scales is None else scales.unbind()
    counts = [_count(w, t, scale) for w, t, scale in zip(parameters, thresholds, factors, strict=True)]
    ties = _count_ties(counts, policy, sparsity)
    return [
        LayerReport(weight.name, tuple(w.shape), w.numel(), count.zeros, t.item(), tie, *_backward(weight, w))
        for weight, w, t, count, tie in zip(weights, parameters, thresholds, counts, ties, strict=True)
    ]


def _backward(weight: PrunableWeight, parameter: Tensor) -> tuple[str, int, bool]:
    """``LayerReport``'s backward, kept_bytes and lean."""
    can = [cast(SparseLayer, use.module).lean_form for use in weight.uses]
    kept = [not (lean and use.binding.recomputes(parameter, None)) for lean, use in zip(can, weight.uses, strict=True)]
    size = parameter.numel() * parameter.element_size()
    return "keeps" if any(kept) else "recomputes", sum(kept) * size, all(can)


@dataclass(frozen=True)
class _Count:
    zeros: int
    largest: float  # largest pruned score
    at_largest: int  # how many have it; several magnitudes may round to one score


def _count(parameter: Tensor, t: Tensor, scale: Tensor | float) -> _Count:
    """By the operator's predicate; at T <= 0 the zeros that the weight has."""
    if parameter.numel() == 0:
        return _Count(0, 0.0, 0)
    magnitude = parameter.to(t.dtype).abs()
    pruned = magnitude <= t.clamp_min(0)
    score = torch.where(pruned, magnitude * scale, 0.0)
    largest = score.max()
    at_largest = torch.count_nonzero(pruned & (score == largest))
    return _Count(int(torch.count_nonzero(pruned)), float(largest), int(at_largest))


def _count_ties(counts: Sequence[_Count], policy: Policy, sparsity: float) -> list[int]:
    """Zeros of each weight beyond its group's budget.

    Those over the weight's own cap; then, from the last weight of the group backwards, those at the group's largest
    pruned score.
    """
    ties = [0] * len(counts)
    ranks = policy.positions(sparsity).ranks if sparsity > 0 and not callable(policy.scope) else []
    for group, rank in enumerate(ranks):
        members = policy.members[group]
        if rank < 0:
            continue
        if policy.caps is not None:
            for i in members:
                ties[i] = max(0, counts[i].zeros - policy.caps[i])
        beyond = sum(counts[i].zeros - ties[i] for i in members) - (rank + 1)
        largest = max(counts[i].largest for i in members)
        for i in reversed(members):
            if counts[i].largest == largest and counts[i].zeros:
                taken = min(max(beyond, 0), max(counts[i].at_largest - ties[i], 0))
                ties[i] += taken
                beyond -= taken
    return ties
