"""What is pruned: per layer and in total, as text, Markdown, CSV or a dict."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

if TYPE_CHECKING:
    from feather_kernels.nn.base import SparseLayer
    from feather_kernels.sparsify.layer_choice import SkippedLayer
    from feather_kernels.sparsify.policies import Policy
    from feather_kernels.sparsify.prunable import PrunableWeight

COLUMNS = ("layer", "shape", "numel", "zeros", "sparsity", "threshold", "ties", "backward", "note")


@dataclass(frozen=True)
class LayerReport:
    """One prunable weight.

    ``zeros`` counts the entries of P(weight) that the operator makes zero (at T = 0: that are zero). ``ties`` counts
    those among them that are zero only because their magnitude equals that of the last weight the budget asked for;
    the budget is given to the layers in their order. ``backward`` says whether the layer's backward pass computes
    P(weight) again ("recomputes", which holds no copy of the weight) or keeps it from the forward pass ("keeps"), where
    autocast is off. ``kept_bytes`` is what the layer holds more than a dense one from forward to backward then;
    ``lean`` whether recompute=True would make that nothing. ``note`` is what else there is to know of the layer, or "".
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
    note: str

    @property
    def empty(self) -> bool:
        """Whether no weight is left."""
        return self.numel > 0 and self.zeros == self.numel

    @property
    def remarks(self) -> str:
        """The column "note": that the layer is empty, and its note."""
        return "; ".join(filter(None, ("empty" if self.empty else "", self.note)))

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / self.numel if self.numel else 0.0

    def row(self) -> tuple[str, ...]:
        """The columns of ``COLUMNS`` as text."""
        shape = "x".join(map(str, self.shape))
        numbers = f"{self.sparsity:.4%}", f"{self.threshold:.6g}", str(self.ties), self.backward, self.remarks
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
    def empty_layers(self) -> tuple[LayerReport, ...]:
        """Layers of which the threshold leaves no weight."""
        return tuple(layer for layer in self.layers if layer.empty)

    @property
    def dense_numel(self) -> int:
        """Number of weights in the skipped layers, each once where layers share it."""
        return sum(layer.numel - layer.shared for layer in self.skipped)

    @property
    def model_sparsity(self) -> float:
        """The same zeros as a fraction of all parameters of the model (biases, norms, skipped layers included)."""
        return self.zeros / self.model_parameters

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        totals = ("numel", "zeros", "sparsity", "ties", "model_sparsity", "kept_bytes", "dense_numel")
        return {
            "step": self.step,
            "target_sparsity": self.target_sparsity,
            "model_parameters": self.model_parameters,
            **{name: getattr(self, name) for name in totals},
            "layers": [
                {**asdict(layer), "shape": list(layer.shape), "sparsity": layer.sparsity, "empty": layer.empty}
                for layer in self.layers
            ],
            "skipped": [{**asdict(layer), "model_share": self._share(layer.numel)} for layer in self.skipped],
        }

    def to_csv(self) -> str:
        """One line per prunable weight, with a header; numbers unrounded."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            numbers = layer.numel, layer.zeros, layer.sparsity, layer.threshold, layer.ties
            writer.writerow((layer.name, shape, *numbers, layer.backward, layer.remarks))
        return text.getvalue()

    def to_markdown(self) -> str:
        """A Markdown table, the totals, and the skipped layers."""
        lines = [" | ".join(COLUMNS), " | ".join(["---", "---", *["---:"] * (len(COLUMNS) - 4), "---", "---"])]
        lines += [" | ".join(layer.row()) for layer in self.layers]
        lines = [f"| {line} |" for line in lines] + ["", *self._totals()]
        if self.skipped:
            lines += ["", f"{self._dense_total()}:", "", *(f"- `{name}`: {text}" for name, text in self._left_dense())]
        return "\n".join(lines)

    def __str__(self) -> str:
        rows = [COLUMNS, *(layer.row() for layer in self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if i in (0, 1, 7, 8) else cell.rjust(width) for i, (cell, width) in enumerate(zipped)
            )
            for zipped in (list(zip(row, widths, strict=True)) for row in rows)
        ]
        lines.insert(1, "-" * len(lines[0]))
        lines += ["", *self._totals()]
        if self.skipped:
            lines += [self._dense_total(), *(f"left dense: {name}: {text}" for name, text in self._left_dense())]
        return "\n".join(line.rstrip() for line in lines)

    def _totals(self) -> list[str]:
        ties = f", {self.ties} of them ties" if self.ties else ""
        return [
            f"{self.zeros:,} of {self.numel:,} prunable weights are zero{ties}: sparsity {self.sparsity:.4%} "
            f"(target {self.target_sparsity:.4%} at step {self.step})",
            f"{self.model_sparsity:.4%} of all {self.model_parameters:,} parameters",
            *self._empty(),
            self._memory(),
        ]

    def _empty(self) -> list[str]:
        """A line about the empty layers, if there are any."""
        count, one = len(self.empty_layers), len(self.empty_layers) == 1
        what = f"{count} {'layer is' if one else 'layers are'} empty, without one weight left"
        return [f"{what}: min_density=... keeps a fraction of {'it' if one else 'each'}"] if count else []

    def _dense_total(self) -> str:
        count, weights = len(self.skipped), self.dense_numel
        layers = f"{count} layer{'' if count == 1 else 's'}"
        return f"left dense: {layers}, {weights:,} weights, {self._share(weights):.4%} of all parameters"

    def _left_dense(self) -> list[tuple[str, str]]:
        """Names of the skipped layers, and their reasons with their sizes."""
        return [
            (layer.name, f"{layer.reason} ({layer.numel:,} weights, {self._share(layer.numel):.4%} of all parameters)")
            for layer in self.skipped
        ]

    def _share(self, numel: int) -> float:
        """Fraction of all parameters of the model."""
        return numel / self.model_parameters

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
    reports = []
    for weight, w, t, count, tie in zip(weights, parameters, thresholds, counts, ties, strict=True):
        numbers = tuple(w.shape), w.numel(), count.zeros, t.item(), tie
        reports.append(LayerReport(weight.name, *numbers, *_backward(weight, w), weight.note))
    return reports


def _backward(weight: PrunableWeight, parameter: Tensor) -> tuple[str, int, bool]:
    """``LayerReport``'s backward, kept_bytes and lean."""
    can = [cast("SparseLayer", use.module).lean_form for use in weight.uses]
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
