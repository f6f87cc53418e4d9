"""Erdos-Renyi-kernel allocation of densities over layers (Evci et al. 2020)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate


class ErdosRenyiKernel:
    """Densities in proportion to ``raw = sum(shape) / prod(shape)``; those that would exceed 1 are 1.

    With one factor for all layers, ``sparsity = max(0, 1 - factor raw)``; the densities, weighted by size, average
    ``1 - s``.

    Args:
        shapes: of the layers' weights.
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
        """The factor at which the layers' sparsities average ``sparsity``; inf, at which all are 0, for 0."""
        if sparsity == 0:
            return math.inf  # exactly: a rounding error above 0 would prune one weight
        count, factor = 0, 0.0
        while self._open[count]:
            share = ((1 - sparsity) * self._dense[-1] - self._dense[count]) / self._open[count]
            factor = max(factor, share)  # it grows, but for rounding: what was dense stays so
            full = count
            while full < len(self._raw) and factor * self._raw[full] > 1:
                full += 1
            if full == count:
                break
            count = full
        return factor

    def sparsities(self, factor: float) -> list[float]:
        """Sparsity of each layer."""
        return [max(0.0, 1 - factor * raw) for raw in self.raw]  # 0 for NaN, which is inf * 0
