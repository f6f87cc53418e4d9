"""report.png: the curves of a run, and the sparsity of each layer."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

from feather_kernels.cli.counted import counted

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from feather_kernels.cli.train.config import TrainConfig
    from feather_kernels.cli.train.training import Row
    from feather_kernels.sparsify import Report

TRAIN, TEST, NEUTRAL = "#4477aa", "#cc3311", "#555555"


def draw(config: TrainConfig, rows: Sequence[Row], report: Report) -> bytes:
    """Draw loss, accuracy, sparsity and threshold over the epochs, and the sparsity of each layer, as PNG.

    Args:
        config: the options, for the title.
        rows: at least one, with the keys of ``training.COLUMNS``.
        report: of the finalized model.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, max(7.5, 2.2 + 0.3 * len(report.layers))), layout="constrained", dpi=110)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)  # type: ignore[union-attr, call-arg]  # inches
    figure.suptitle(
        f"{config.data_name}, {config.model}, {config.method}, {counted(config.epochs, 'epoch')}: test accuracy "
        f"{rows[-1]['test_accuracy']:.2%} at sparsity {report.sparsity:.4f} (target {config.sparsity:g})",
        fontsize=14,
    )
    axes = figure.subplot_mosaic([["loss", "accuracy", "layers"], ["sparsity", "threshold", "layers"]])
    _draw_curves(axes["loss"], rows, {"train_loss": TRAIN, "test_loss": TEST})
    axes["loss"].set(title="Loss", ylabel="cross-entropy (nats per image)")
    axes["loss"].set_ylim(bottom=0)
    axes["loss"].legend(["train", "test"], frameon=False)
    _draw_curves(axes["accuracy"], rows, {"train_accuracy": TRAIN, "test_accuracy": TEST}, factor=100)
    axes["accuracy"].set(title="Accuracy", ylabel="correct answers (%)")
    axes["accuracy"].legend(["train", "test"], frameon=False)
    _draw_curves(axes["sparsity"], rows, {"sparsity_target": NEUTRAL, "sparsity": TEST}, factor=100)
    axes["sparsity"].lines[0].set(linewidth=5, alpha=0.35, marker="")
    axes["sparsity"].set(title="Sparsity of all prunable weights", ylabel="zeros (%)", ylim=(-3, 103))
    axes["sparsity"].legend(["target", "actual"], frameon=False, loc="lower right")
    _draw_curves(axes["threshold"], rows, {"threshold": NEUTRAL})
    axes["threshold"].set(title="Global threshold T", ylabel="magnitude |w|")
    axes["threshold"].set_ylim(bottom=0)
    draw_layers(axes["layers"], report)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _draw_curves(axes: Axes, rows: Sequence[Row], colors: dict[str, str], factor: float = 1) -> None:
    """Draw columns of ``rows`` over the epochs, each in its colour."""
    from matplotlib.ticker import MaxNLocator

    epochs = [row["epoch"] for row in rows]
    for column, color in colors.items():
        values = [factor * row[column] for row in rows]
        axes.plot(epochs, values, color=color, marker="o" if len(epochs) <= 40 else None, markersize=3)
    axes.set_xlabel("epoch")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def draw_layers(axes: Axes, report: Report) -> None:
    """Draw a horizontal bar for each layer with its sparsity and its size, the first layer of the model on top."""
    positions = range(len(report.layers))
    colors = [TEST if layer.empty else TRAIN for layer in report.layers]
    axes.barh(positions, [100 * layer.sparsity for layer in report.layers], color=colors, height=0.7)
    for position, layer in zip(positions, report.layers, strict=True):
        share = "empty, all" if layer.empty else f"{layer.sparsity:.1%}"
        color = TEST if layer.empty else "black"
        axes.text(102, position, f"{share} of {layer.numel:,}", va="center", fontsize=8, color=color)
    axes.axvline(100 * report.sparsity, color=TEST, linewidth=1, linestyle="--", label="all layers")
    axes.set_yticks(positions, [layer.name for layer in report.layers], fontsize=8)
    axes.set(title="Sparsity per layer", xlabel="zeros (%)", xlim=(0, 150), xticks=range(0, 101, 20))
    axes.set_ylim(len(report.layers) - 0.4, -0.6)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.07))
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines["bottom"].set_bounds(0, 100)
