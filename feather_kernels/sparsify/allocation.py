"""Erdos-Renyi-kernel allocation of densities over layers (Evci et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate


class ErdosRenyiKernel:
    """Gives each layer a density in proportion to ``raw = sum(shape) / prod(shape)``, but at most 1.

    One factor serves all layers: ``density = min(1, factor raw)``. Weighted by size, the densities average ``1 - s``
    for the sparsity s of the model.

    Args:
        shapes: the shapes of the layers' weights.
    """

    def __init__(self, shapes: Sequence[Sequence[int]]) -> None:
        sizes = [math.prod(shape) for shape in shapes]
        sums = [sum(shape) if size else 0 for shape, size in zip(shapes, sizes, strict=True)]
        self.raw = [total / size if size else 0.0 for total, size in zip(sums, sizes, strict=True)]
        order = sorted(range(len(shapes)), key=lambda layer: -self.raw[layer])
        self._raw = [self.raw[layer] for layer in order]  # layers become dense in this order
        self._dense = [0, *accumulate(sizes[layer] for layer in order)]  # elements of the first layers
        self._open = [sum(sums) - total for total in [0, *accumulate(sums[layer] for layer in order)]]

    def factor(self, sparsity: float) -> float:
        """The factor at which the layers' sparsities average ``sparsity``; inf for 0."""
        if sparsity == 0:
            return math.inf  # makes all sparsities exactly 0; a rounding error above 0 would prune a weight
        count, factor = 0, 0.0
        while self._open[count]:
            share = ((1 - sparsity) * self._dense[-1] - self._dense[count]) / self._open[count]
            factor = max(factor, share)  # it only grows, except by rounding: dense layers stay dense
            full = count
            while full < len(self._raw) and factor * self._raw[full] > 1:
                full += 1
            if full == count:
                break
            count = full
        return factor

    def sparsities(self, factor: float) -> list[float]:
        """The sparsity of each layer at a factor."""
        return [max(0.0, 1 - factor * raw) for raw in self.raw]  # inf * 0 is NaN, which gives 0
