"""report.png: the course of a run and where its zeros are."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from feather_kernels.recipes.config import TrainConfig
from feather_kernels.recipes.training import Row
from feather_kernels.sparsify import Report

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAIN, TEST, NEUTRAL = "#4477aa", "#cc3311", "#555555"


def draw(config: TrainConfig, rows: Sequence[Row], report: Report) -> bytes:
    """The figure as PNG: loss, accuracy, sparsity and threshold over the epochs; sparsity per layer.

    Args:
        config: the options, for the title.
        rows: at least one, with the keys of ``training.COLUMNS``.
        report: of the finalized model.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, max(7.5, 2.2 + 0.3 * len(report.layers))), layout="constrained", dpi=110)
    FigureCanvasAgg(figure)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]  # inches
    figure.suptitle(
        f"{config.data_name}, {config.model}, {config.epochs} epochs: test accuracy "
        f"{rows[-1]['test_accuracy']:.2%} at sparsity {report.sparsity:.4f} (target {config.sparsity:g})",
        fontsize=14,
    )
    axes = figure.subplot_mosaic([["loss", "accuracy", "layers"], ["sparsity", "threshold", "layers"]])
    epochs = [row["epoch"] for row in rows]
    _draw_loss(axes["loss"], epochs, rows)
    _draw_accuracy(axes["accuracy"], epochs, rows)
    _draw_sparsity(axes["sparsity"], epochs, rows)
    _draw_threshold(axes["threshold"], epochs, rows)
    _draw_layers(axes["layers"], report)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_loss(axes: Axes, epochs: Sequence[float], rows: Sequence[Row]) -> None:
    _draw_pair(axes, epochs, rows, "loss", 1)
    _label(axes, "Loss", "cross-entropy (nats per image)")
    _begin_at_zero(axes)


def _draw_accuracy(axes: Axes, epochs: Sequence[float], rows: Sequence[Row]) -> None:
    _draw_pair(axes, epochs, rows, "accuracy", 100)
    _label(axes, "Accuracy", "correct answers (%)")


def _draw_pair(axes: Axes, epochs: Sequence[float], rows: Sequence[Row], quantity: str, factor: float) -> None:
    for part, color in (("train", TRAIN), ("test", TEST)):
        values = [factor * row[f"{part}_{quantity}"] for row in rows]
        axes.plot(epochs, values, color=color, label=part, marker=_marker(epochs), markersize=3)
    axes.legend(frameon=False)


def _draw_sparsity(axes: Axes, epochs: Sequence[float], rows: Sequence[Row]) -> None:
    target = [100 * row["sparsity_target"] for row in rows]
    actual = [100 * row["sparsity"] for row in rows]
    axes.plot(epochs, target, color=NEUTRAL, label="target", linewidth=5, alpha=0.35)
    axes.plot(epochs, actual, color=TEST, label="actual", marker=_marker(epochs), markersize=3)
    axes.legend(frameon=False, loc="lower right")
    axes.set_ylim(-3, 103)
    _label(axes, "Sparsity of all prunable weights", "zeros (%)")


def _draw_threshold(axes: Axes, epochs: Sequence[float], rows: Sequence[Row]) -> None:
    values = [row["threshold"] for row in rows]
    axes.plot(epochs, values, color=NEUTRAL, marker=_marker(epochs), markersize=3)
    _label(axes, "Global threshold T", "magnitude |w|")
    _begin_at_zero(axes)


def _draw_layers(axes: Axes, report: Report) -> None:
    """Horizontal bars in the order of the model, first layer on top, each with its zeros and its size."""
    positions = range(len(report.layers))
    axes.barh(positions, [100 * layer.sparsity for layer in report.layers], color=TRAIN, height=0.7)
    for position, layer in zip(positions, report.layers, strict=True):
        axes.text(102, position, f"{layer.sparsity:.1%} of {layer.numel:,}", va="center", fontsize=8)
    axes.axvline(100 * report.sparsity, color=TEST, linewidth=1, linestyle="--", label="all layers")
    axes.set_yticks(positions, [layer.name for layer in report.layers], fontsize=8)
    axes.set_xlim(0, 150)
    axes.set_xticks(range(0, 101, 20))
    axes.set_ylim(len(report.layers) - 0.4, -0.6)
    axes.set_title("Sparsity per layer")
    axes.set_xlabel("zeros (%)")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.07))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines["bottom"].set_bounds(0, 100)


def _label(axes: Axes, title: str, unit: str) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title)
    axes.set_xlabel("epoch")
    axes.set_ylabel(unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _begin_at_zero(axes: Axes) -> None:
    largest = axes.dataLim.y1
    if 0 < largest < math.inf:  # neither nothing but zeros nor nothing but NaN
        axes.set_ylim(0, 1.1 * largest)


def _marker(epochs: Sequence[float]) -> str | None:
    return "o" if len(epochs) <= 40 else None
