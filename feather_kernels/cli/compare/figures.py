"""The figures of a grid: accuracy over sparsity, and the zeros of each layer."""

from __future__ import annotations

import io
import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

from feather_kernels.cli.compare.table import Entry, entries, title

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from feather_kernels.cli.compare.results import Layer, Result

# Paul Tol's "bright" scheme: distinguishable with any colour vision
COLORS = ("#4477aa", "#cc3311", "#228833", "#ee7733", "#aa3377", "#33bbee", "#bbbbbb")
MARKERS = "osD^vPX"
BESIDE = 0.03  # distance between the error bars of two labels, in columns


def draw_accuracy(results: Sequence[Result]) -> bytes:
    """Draw test accuracy over sparsity, as PNG.

    Each label is a line with error bars of one standard deviation, or a single marker if it has one sparsity. Markers
    are hollow if there is only one seed. Dense training is a horizontal line.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 5.2), layout="constrained", dpi=120)
    axes = figure.subplots()
    sparsities = sorted({result.sparsity for result in results if result.sparsity > 0})
    for index, (label, row) in enumerate(entries(results).items()):
        points = {sparsity: entry for sparsity, entry in row.items() if entry.accuracies}
        color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
        if not points:  # no cell has finished
            continue
        if list(points) == [0]:
            _draw_level(axes, label, points[0])
            continue
        one_seed = all(len(entry.accuracies) == 1 for entry in points.values())
        axes.errorbar(
            [sparsities.index(sparsity) + BESIDE * index for sparsity in points if sparsity > 0],
            [100 * entry.mean for sparsity, entry in points.items() if sparsity > 0],
            yerr=[100 * (entry.spread or 0.0) for sparsity, entry in points.items() if sparsity > 0],
            label=f"{label} (one seed)" if one_seed else label,
            color=color,
            marker=marker,
            capsize=4,
            markerfacecolor="white" if one_seed else color,
        )
    axes.set_xticks(range(len(sparsities)), [f"{100 * sparsity:g}" for sparsity in sparsities])
    axes.set(title=title(results), xlabel="zeros among the prunable weights (%)", ylabel="test accuracy (%)")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    return _png(figure)


def draw_layers(results: Sequence[Result], layers: Sequence[Layer]) -> bytes:
    """Draw the share of weights left in each layer, as PNG: a panel for each sparsity, a line for each label."""
    from matplotlib.figure import Figure

    sparsities = sorted({layer.sparsity for layer in layers if layer.sparsity > 0})
    names = list(dict.fromkeys(layer.layer for layer in layers))
    panels = max(len(sparsities), 1)
    figure = Figure(figsize=(2.5 + 3.2 * panels, 1.8 + 0.24 * max(len(names), 8)), layout="constrained", dpi=110)
    figure.suptitle(f"{title(results)}: weights left in each layer")
    grid = figure.subplots(1, panels, sharey=True, squeeze=False)
    labels = list(entries(results))
    for axes, sparsity in zip(grid[0], sparsities, strict=False):
        for index, label in enumerate(labels):
            left = {
                name: [1 - layer.zeros / layer.numel for layer in layers if _is(layer, label, sparsity, name)]
                for name in names
            }
            places = [place for place, name in enumerate(names) if left[name]]
            means = [100 * statistics.fmean(left[names[place]]) for place in places]
            if places:
                color, marker = COLORS[index % len(COLORS)], MARKERS[index % len(MARKERS)]
                axes.plot(means, places, color=color, marker=marker, markersize=4, linewidth=1, label=label)
        axes.set(title=f"sparsity {sparsity:g}", xlabel="non-zero (%)")
        axes.set_xscale("symlog", linthresh=0.1)
        axes.xaxis.set_major_formatter("{x:g}")
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    if sparsities:
        grid[0][0].set_yticks(range(len(names)), names, fontsize=7)
        grid[0][0].set_ylim(len(names) - 0.5, -0.5)
        handles = {
            label: line for axes in grid[0] for line, label in zip(*axes.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles, frameon=False, loc="outside lower center", ncols=4)
    return _png(figure)


def _draw_level(axes: Axes, label: str, entry: Entry) -> None:
    axes.axhline(100 * entry.mean, color="#555555", linestyle="--", linewidth=1, label=label)
    spread = entry.spread or 0.0
    axes.axhspan(100 * (entry.mean - spread), 100 * (entry.mean + spread), color="#555555", alpha=0.12, linewidth=0)


def _is(layer: Layer, label: str, sparsity: float, name: str) -> bool:
    return (layer.label, layer.sparsity, layer.layer) == (label, sparsity, name)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
