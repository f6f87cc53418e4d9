"""What is pruned: per layer and in total, as text, Markdown, CSV or a dict."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, dataclass
from typing import Any

from feather_kernels.sparsify.selection import SkippedLayer

COLUMNS = ("layer", "shape", "numel", "zeros", "sparsity", "threshold", "ties")


@dataclass(frozen=True)
class LayerReport:
    """One prunable weight.

    ``zeros`` counts the entries of P(weight) that the operator makes zero (at T = 0: that are zero). ``ties`` counts
    those among them that are zero only because their magnitude equals that of the last weight the budget asked for;
    the budget is given to the layers in their order.
    """

    name: str
    shape: tuple[int, ...]
    numel: int
    zeros: int
    threshold: float
    ties: int

    @property
    def sparsity(self) -> float:
        """Fraction of zeros."""
        return self.zeros / self.numel if self.numel else 0.0

    def row(self) -> tuple[str, ...]:
        """The columns of ``COLUMNS`` as text."""
        shape = "x".join(map(str, self.shape))
        numbers = f"{self.sparsity:.4%}", f"{self.threshold:.6g}", str(self.ties)
        return self.name, shape, str(self.numel), str(self.zeros), *numbers


@dataclass(frozen=True)
class Report:
    """State of a sparsified model; ``str()`` is a table."""

    step: int
    target_sparsity: float
    layers: tuple[LayerReport, ...]
    skipped: tuple[SkippedLayer, ...]
    model_parameters: int

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
        """Zeros beyond ``floor((numel - 1) target) + 1``, there because of equal magnitudes."""
        return sum(layer.ties for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Fraction of zeros among the prunable weights."""
        return self.zeros / self.numel

    @property
    def model_sparsity(self) -> float:
        """The same zeros as a fraction of all parameters of the model (biases, norms, skipped layers included)."""
        return self.zeros / self.model_parameters

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists and dicts."""
        totals = ("numel", "zeros", "sparsity", "ties", "model_sparsity")
        return {
            "step": self.step,
            "target_sparsity": self.target_sparsity,
            "model_parameters": self.model_parameters,
            **{name: getattr(self, name) for name in totals},
            "layers": [{**asdict(layer), "sparsity": layer.sparsity} for layer in self.layers],
            "skipped": [asdict(layer) for layer in self.skipped],
        }

    def to_csv(self) -> str:
        """One line per prunable weight, with a header; numbers unrounded."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(COLUMNS)
        for layer in self.layers:
            shape = "x".join(map(str, layer.shape))
            writer.writerow((layer.name, shape, layer.numel, layer.zeros, layer.sparsity, layer.threshold, layer.ties))
        return text.getvalue()

    def to_markdown(self) -> str:
        """A Markdown table, the totals, and the skipped layers."""
        lines = [" | ".join(COLUMNS), " | ".join(["---", "---", *["---:"] * (len(COLUMNS) - 2)])]
        lines += [" | ".join(layer.row()) for layer in self.layers]
        lines = [f"| {line} |" for line in lines] + ["", *self._totals()]
        if self.skipped:
            lines += ["", "Left dense:", "", *(f"- `{layer.name}`: {layer.reason}" for layer in self.skipped)]
        return "\n".join(lines)

    def __str__(self) -> str:
        rows = [COLUMNS, *(layer.row() for layer in self.layers)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) if i < 2 else cell.rjust(width) for i, (cell, width) in enumerate(zipped))
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
        ]
