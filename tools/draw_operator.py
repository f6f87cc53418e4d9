"""Draws the README's picture, docs/images/operator.png: the thresholding operator for several powers.

python -m tools.draw_operator
"""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib
import torch
from matplotlib import pyplot

from feather_kernels.functional import threshold

FILE = Path(__file__).parents[1] / "docs" / "images" / "operator.png"
CURVES = {
    1.0: ("p = 1 (soft thresholding)", "#b0b0b0"),
    3.0: ("p = 3 (Feather)", "#d1495b"),
    math.inf: ("p = ∞ (hard thresholding)", "#30638e"),
}


def draw() -> None:
    """Plot P(w) over w for T = 1, as the op itself computes it, and write the picture."""
    matplotlib.use("agg")
    positive = 1 + 1.5 * torch.linspace(0.0, 1.0, 2000)[1:] ** 3  # beyond T, dense where p = 3 is steep
    figure, axes = pyplot.subplots(figsize=(6.4, 3.2), dpi=200, layout="constrained")
    axes.plot([-2.5, 2.5], [-2.5, 2.5], color="#dddddd", linewidth=1, linestyle="--", label="dense: P(w) = w")
    for power, (label, color) in CURVES.items():
        values = threshold(positive, 1.0, power)
        for sign in (1, -1):
            axes.plot(sign * positive, sign * values, color=color, linewidth=2, label=label if sign == 1 else None)
    axes.plot([-1, 1], [0, 0], color="black", linewidth=2.5, label="pruned: P(w) = 0")
    axes.set(xlabel="latent weight w", ylabel="P(w) / T", xlim=(-2.5, 2.5), ylim=(-2.5, 2.5))
    axes.set_xticks([-2, -1, 0, 1, 2], ["-2T", "-T", "0", "T", "2T"])
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    FILE.parent.mkdir(exist_ok=True)
    figure.savefig(FILE)


if __name__ == "__main__":
    draw()
