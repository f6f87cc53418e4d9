"""The table of a grid, with a row for each label and a column for each sparsity: mean and spread over the seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from feather_kernels.cli.compare.results import FAILED, FINISHED, Result


@dataclass(frozen=True)
class Entry:
    """The cells of one label and sparsity.

    Attributes:
        accuracies: of the finished cells, as fractions.
        failed: the number of failed cells.
        cells: the number of all cells.
    """

    accuracies: list[float]
    failed: int
    cells: int

    @property
    def mean(self) -> float:
        """Mean accuracy; at least one cell must have finished."""
        return statistics.fmean(self.accuracies)

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds (n - 1); None if fewer than two have finished."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else None

    def __str__(self) -> str:
        """E.g. ``64.20 ± 0.31 (2)``, ``64.20 (1 of 2)``, ``failed``."""
        if not self.accuracies:
            return "failed" if self.failed == self.cells else "open"
        spread = "" if self.spread is None else f" ± {100 * self.spread:.2f}"
        done = len(self.accuracies)
        count = f"{done}" if done == self.cells else f"{done} of {self.cells}"
        failed = f", {self.failed} failed" if self.failed else ""
        return f"{100 * self.mean:.2f}{spread} ({count}{failed})"


def entries(results: Sequence[Result]) -> dict[str, dict[float, Entry]]:
    """The entries by label, in the order of the grid, and by sparsity, in rising order."""
    sparsities = sorted({result.sparsity for result in results})
    table: dict[str, dict[float, Entry]] = {}
    for label in dict.fromkeys(result.label for result in results):
        for sparsity in sparsities:
            group = [result for result in results if (result.label, result.sparsity) == (label, sparsity)]
            if group:
                accuracies = [result.test_accuracy for result in group if result.status == FINISHED]
                failed = sum(result.status == FAILED for result in group)
                known = [accuracy for accuracy in accuracies if accuracy is not None]
                table.setdefault(label, {})[sparsity] = Entry(known, failed, len(group))
    return table


def title(results: Sequence[Result]) -> str:
    """What the cells have in common: data, model and epochs."""
    parts = [sorted({getattr(result, name) for result in results}) for name in ("data", "model", "epochs")]
    data, model, epochs = (" / ".join(map(str, part)) for part in parts)
    return f"{data}, {model}, {epochs} {'epoch' if epochs == '1' else 'epochs'}"


def to_markdown(results: Sequence[Result]) -> str:
    """The table, followed by the failed cells with their reasons."""
    table = entries(results)
    sparsities = sorted({result.sparsity for result in results})
    finished = sum(result.status == FINISHED for result in results)
    lines = [
        f"{title(results)}: test accuracy in %, mean ± standard deviation over the seeds (number of seeds), by the "
        f"fraction of zeros among the prunable weights. {finished} of {len(results)} cells have finished.",
        "",
        f"| method | {' | '.join('dense' if sparsity == 0 else f'{sparsity:g}' for sparsity in sparsities)} |",
        f"|---|{'---|' * len(sparsities)}",
    ]
    for label, row in table.items():
        lines.append(f"| {label} | {' | '.join(str(row.get(sparsity, '')) for sparsity in sparsities)} |")
    failed = [result for result in results if result.status == FAILED]
    if failed:
        lines += ["", "Failed twice:", ""]
        lines += [f"- {result.label}, {result.sparsity:g}, seed {result.seed}: {result.note}" for result in failed]
    return "\n".join(lines) + "\n"
