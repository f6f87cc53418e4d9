"""The report on a sparse model: zeros, ties and memory per layer and in total, as text, Markdown, CSV or a dict."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from feather_kernels.nn.dtensor import local_part
from feather_kernels.sparsify.statistics import WHOLE_WEIGHTS, PrunedCount, Statistics

if TYPE_CHECKING:
    from feather_kernels.nn.base import SparseLayer
    from feather_kernels.sparsify.layer_choice import SkippedLayer
    from feather_kernels.sparsify.policies import Policy
    from feather_kernels.sparsify.prunable import PrunableWeight

COLUMNS = ("layer", "shape", "numel", "zeros", "sparsity", "threshold", "ties", "backward", "note")


@dataclass(frozen=True)
class LayerReport:
    """The report on one prunable weight.

    Attributes:
        name: name of the layer, or names of the layers joined by ``=`` if the weight is tied.
        shape: shape of the weight.
        numel: number of its elements.
        zeros: number of elements of P(weight) that are pruned; if T is 0, that are zero already.
        threshold: T.
        ties: zeros beyond the budget, which have the same magnitude as the last weight within it. Earlier layers use
            up the budget first.
        backward: "recomputes" if backward recomputes P(weight), "keeps" if it is kept from the forward pass; under
            autocast this may differ. "" once the layer is dense again.
        kept_bytes: memory that the layer holds from forward to backward in addition to a dense layer's, without
            autocast.
        can_recompute: whether ``recompute=True`` would reduce ``kept_bytes`` to 0.
        note: remark on the layer, or "".

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.9), scope="layer")
        >>> for layer in sparsifier.report().layers:
        ...     print(layer.name, layer.shape, layer.zeros, f"{layer.sparsity:.1%}", layer.backward)
        0 (32, 64) 1843 90.0% keeps
        2 (10, 32) 288 90.0% keeps
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    zeros: int
    threshold: float
    ties: int
    backward: str
    kept_bytes: int
    can_recompute: bool
    note: str

    @property
    def empty(self) -> bool:
        """Whether the layer has no weight left."""
        return self.numel > 0 and self.zeros == self.numel

    @property
    def remarks(self) -> str:
        """The text of the column "note": "empty" if the layer is, and its note."""
        return "; ".join(filter(None, ("empty" if self.empty else "", self.note)))

    @property
    def sparsity(self) -> float:
        """Fraction of zeros in the weight."""
        return self.zeros / self.numel if self.numel else 0.0

    def row(self) -> tuple[str, ...]:
        """The cells of the layer's row in a table, one per entry of ``COLUMNS``."""
        shape = "x".join(map(str, self.shape))
        numbers = f"{self.sparsity:.4%}", f"{self.threshold:.6g}", str(self.ties), self.backward, self.remarks
        return self.name, shape, str(self.numel), str(self.zeros), *numbers


@dataclass(frozen=True)
class Report:
    """The report on a sparse model, made by ``Sparsifier.report()``; ``str(report)`` is a table.

    Attributes:
        step: number of steps that the sparsifier has counted.
        target_sparsity: sparsity of the schedule at this step.
        layers: one entry per prunable weight.
        skipped: the layers that stay dense, with reasons.
        model_parameters: number of all parameters of the model.
        budget: number of zeros that the schedule asks for at this step.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> report = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.9), ignore=["2"]).report()
        >>> report.zeros, report.numel, f"{report.sparsity:.2%} of the weights, {report.model_sparsity:.2%} of all"
        (1843, 2048, '89.99% of the weights, 76.47% of all')
        >>> [(layer.name, layer.reason) for layer in report.skipped]
        [('2', 'in ignore')]
        >>> print(report.to_csv().splitlines()[0])
        layer,shape,numel,zeros,sparsity,threshold,ties,backward,note
    """

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
        """Number of zeros beyond the budget, due to equal magnitudes.

        In the global scope the budget is ``floor((numel - 1) target_sparsity) + 1``.
        """
        return sum(layer.ties for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the prunable weights."""
        return self.zeros / self.numel

    @property
    def kept_bytes(self) -> int:
        """Memory in bytes that P(weight) holds from forward to backward, in addition to a dense model's."""
        return sum(layer.kept_bytes for layer in self.layers)

    @property
    def empty_layers(self) -> tuple[LayerReport, ...]:
        """The layers that have no weight left."""
        return tuple(layer for layer in self.layers if layer.empty)

    @property
    def dense_numel(self) -> int:
        """Number of weights in the skipped layers; shared ones count once."""
        return sum(layer.numel - layer.shared for layer in self.skipped)

    @property
    def model_sparsity(self) -> float:
        """Zeros as a fraction of all parameters of the model, including biases, norms and skipped layers."""
        return self.zeros / self.model_parameters

    def to_dict(self) -> dict[str, Any]:
        """The report as numbers, strings, lists and dicts, for JSON."""
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
        """The report as CSV: a header, then one line per prunable weight, with unrounded numbers."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            numbers = layer.numel, layer.zeros, layer.sparsity, layer.threshold, layer.ties
            writer.writerow((layer.name, shape, *numbers, layer.backward, layer.remarks))
        return text.getvalue()

    def to_markdown(self) -> str:
        """The report as Markdown: a table of the prunable weights, the totals, and the skipped layers."""
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
            *self._memory(),
        ]

    def _empty(self) -> list[str]:
        """One line about the empty layers, or none."""
        count, one = len(self.empty_layers), len(self.empty_layers) == 1
        found = f"{count} {'layer is' if one else 'layers are'} empty, with no weight left"
        advice = f": min_density=... keeps a fraction of {'it' if one else 'each'}" if self._is_sparse else ""
        return [f"{found}{advice}"] if count else []

    def _dense_total(self) -> str:
        count, weights = len(self.skipped), self.dense_numel
        layers = f"{count} layer{'' if count == 1 else 's'}"
        return f"left dense: {layers}, {weights:,} weights, {self._share(weights):.4%} of all parameters"

    def _left_dense(self) -> list[tuple[str, str]]:
        """(name, reason and size) of each skipped layer."""
        return [
            (layer.name, f"{layer.reason} ({layer.numel:,} weights, {self._share(layer.numel):.4%} of all parameters)")
            for layer in self.skipped
        ]

    def _share(self, numel: int) -> float:
        """``numel`` as a fraction of all parameters."""
        return numel / self.model_parameters

    @property
    def _is_sparse(self) -> bool:
        """Whether the model is still sparse, so that advice about its training can be followed."""
        return any(layer.backward for layer in self.layers)

    def _memory(self) -> list[str]:
        """One line about the memory of P(weight), and how far ``recompute`` would reduce it; none for dense layers."""
        if not self._is_sparse:
            return []
        held = f"P(w) holds {self.kept_bytes / 1e6:,.1f} MB more than a dense model from forward to backward"
        least = sum(layer.kept_bytes for layer in self.layers if not layer.can_recompute)
        if least < self.kept_bytes:
            return [f"{held}; {least / 1e6:,.1f} MB with recompute=True, which computes P(w) twice"]
        return [held]


def of_dense_layers(report: Report) -> Report:
    """The same counts once the layers are dense again, where no P(weight) is kept or recomputed."""
    layers = [replace(layer, backward="", kept_bytes=0, can_recompute=False) for layer in report.layers]
    return replace(report, layers=tuple(layers))


@torch.no_grad()
def measure_layers(
    weights: Sequence[PrunableWeight],
    parameters: Sequence[Tensor],
    policy: Policy,
    sparsity: float,
    statistics: Statistics = WHOLE_WEIGHTS,
) -> list[LayerReport]:
    """Report on every weight under its threshold, with ties against the policy's budget at ``sparsity``.

    ``parameters`` hold the weights; if they are sharded, ``statistics`` adds up what all processes have of them.
    """
    local = list(map(local_part, parameters))
    scales = policy.scales(local, statistics)
    counts = statistics.combine(_count_all(weights, local, scales))
    ties = _count_ties(counts, policy, sparsity)
    return [
        _layer_report(weight, parameter, parameter.shape, count.zeros, tie)
        for weight, parameter, count, tie in zip(weights, parameters, counts, ties, strict=True)
    ]


@torch.no_grad()
def measure_own_parts(weights: Sequence[PrunableWeight], parameters: Sequence[Tensor]) -> list[LayerReport]:
    """The same of what this process has of sharded weights; a part says nothing about ties, which stay 0."""
    local = list(map(local_part, parameters))
    return [
        _layer_report(weight, parameter, own.shape, count.zeros, 0)
        for weight, parameter, own, count in zip(
            weights, parameters, local, _count_all(weights, local, None), strict=True
        )
    ]


def _layer_report(
    weight: PrunableWeight, parameter: Tensor, shape: Sequence[int], zeros: int, ties: int
) -> LayerReport:
    numbers = tuple(shape), math.prod(shape), zeros, weight.uses[0].binding.value.item(), ties
    return LayerReport(weight.name, *numbers, *_backward(weight, parameter), weight.note)


def _backward(weight: PrunableWeight, parameter: Tensor) -> tuple[str, int, bool]:
    """The fields backward, kept_bytes and can_recompute of a LayerReport."""
    can = [cast("SparseLayer", use.module).can_recompute for use in weight.uses]
    kept = [
        not (possible and use.binding.recomputes(parameter, None))
        for possible, use in zip(can, weight.uses, strict=True)
    ]
    size = parameter.numel() * parameter.element_size()
    return "keeps" if any(kept) else "recomputes", sum(kept) * size, all(can)


def _count_all(
    weights: Sequence[PrunableWeight], parameters: Sequence[Tensor], scales: Tensor | None
) -> list[PrunedCount]:
    factors: Sequence[Tensor | float] = [1.0] * len(weights) if scales is None else scales.unbind()
    return [
        _count(w, weight.uses[0].binding.value.to(w.device), factor)
        for weight, w, factor in zip(weights, parameters, factors, strict=True)
    ]


def _count(parameter: Tensor, t: Tensor, scale: Tensor | float) -> PrunedCount:
    """Count what the operator prunes; at T <= 0, the zeros that the weight has already."""
    if parameter.numel() == 0:
        return PrunedCount(0, 0.0, 0)
    magnitude = parameter.to(t.dtype).abs()
    pruned = magnitude <= t.clamp_min(0)
    score = torch.where(pruned, magnitude * scale, 0.0)
    largest = score.max()
    at_largest = torch.count_nonzero(pruned & (score == largest))
    return PrunedCount(int(torch.count_nonzero(pruned)), float(largest), int(at_largest))


def _count_ties(counts: Sequence[PrunedCount], policy: Policy, sparsity: float) -> list[int]:
    """Count the zeros of each weight beyond the budget of its group.

    First come the zeros beyond the weight's own cap, then those at the group's largest pruned score, from the last
    weight of the group backwards.
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
