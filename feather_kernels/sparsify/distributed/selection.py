"""Exact order statistics of sharded weights: every process counts its part, and the counts are added.

A radix search needs one histogram of integers for each digit, and the sum of the parts' histograms is that of the whole
weights. So all processes find the same bits as one process that has all weights, whatever part each of them has.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from feather_kernels.backends import radix
from feather_kernels.backends.interface import Histogram, Selection
from feather_kernels.backends.registry import registry
from feather_kernels.dtypes import compute_dtype
from feather_kernels.sparsify.distributed import bracket
from feather_kernels.sparsify.distributed.collectives import add_over_processes, sum_of_parts
from feather_kernels.sparsify.distributed.counting import gather_counts
from feather_kernels.sparsify.statistics import PrunedCount
from feather_kernels.torch_private import norms_of

if TYPE_CHECKING:
    from feather_kernels.backends.interface import CpuBackend
    from feather_kernels.sparsify.distributed.sharding import Part

ops = torch.ops.feather_kernels


class ShardedWeights:
    """``Statistics`` of weights of which this process has a part.

    Args:
        parts: the weights by the processes that they are sharded over.
        step: what the sparsifier has counted; processes at different steps are an error.
    """

    def __init__(self, parts: Sequence[Part], step: int | Tensor) -> None:
        self.parts = parts
        self.step = step
        self._compared: list[Part] = []  # parts over which the steps have been compared in this selection

    def select(self, selection: Selection) -> Tensor:
        """See ``Statistics``.

        A radix search finds the rank and the next together, as two groups of the same weights: three all-reduces for
        float32 keys, of 16 KB a group each. On CPUs a bracket around the hint saves most of the work.
        """
        self._compared.clear()
        found_inside = self._select_inside(selection)
        if found_inside is not None:
            return found_inside
        weights, groups, rank, scales, caps, _ = selection
        count, dtype = rank.numel(), compute_dtype(weights[0].dtype)
        twice = Selection(
            [*weights, *weights],
            [*groups, *(group + count for group in groups)],
            torch.cat((rank, rank + 1)),
            None if scales is None else scales.repeat(2),
            None if caps is None else caps.repeat(2),
        )
        found = radix.find(twice, dtype, self._count_digits)
        (keys, following), sizes = found.keys.view(2, count), found.sizes[:count]
        following = torch.where(rank + 1 < sizes, following, keys)
        return radix.values_at(rank, sizes, keys, following, dtype)

    def _select_inside(self, selection: Selection) -> Tensor | None:
        """By a bracket around the hint, on CPUs; None, in all processes alike, where that does not do."""
        part, hint, device = self.parts[0], selection.hint, selection.rank.device
        if len(self.parts) > 1 or part.group is None or selection.caps is not None or hint is None:
            return None
        if device.type != "cpu" or hint.dtype != torch.float32:
            return None
        collect_keys = cast("CpuBackend", registry.backend_for(device)).collect_keys
        return bracket.select(collect_keys, selection, hint, lambda counts: self._add(counts, part))

    def norms(self, weights: list[Tensor], dtype: torch.dtype) -> Tensor:
        """See ``Statistics``; summed in float64, so that the order of the parts is lost in the rounding."""
        squares = torch.stack(norms_of(weights, torch.float64)).square()
        return sum_of_parts(squares, self.parts, self.step).sqrt().to(dtype)

    def combine(self, counts: list[PrunedCount]) -> list[PrunedCount]:
        """See ``Statistics``."""
        rows = [(count.zeros, count.largest, count.at_largest) for count in counts]
        own = torch.tensor(rows, dtype=torch.float64, device="cpu")
        return [_combined(found) for found in gather_counts(own, self.parts, self.step)]

    def _count_digits(self, histogram: Histogram, counts: Tensor) -> None:
        """A ``magnitude_histogram`` over all processes; of weights listed twice, with the prefixes of two searches.

        The first digits have no prefix: both searches take one count.
        """
        weights, rows, prefix, shift, bits, scales = histogram
        first = shift + bits == sum(radix.RADIX_BITS[compute_dtype(weights[0].dtype)])
        halves = 1 if first else 2
        count = len(weights) // 2
        searched = counts[: len(counts) // 2 * halves]
        searched.zero_()
        factors = None if scales is None else scales.unbind()
        for part in self.parts:
            members = [index + half * count for half in range(halves) for index in part.weights]
            found = ops.magnitude_histogram(
                [weights[index] for index in members],
                [rows[index] for index in members],
                prefix[: len(searched)],
                shift,
                bits,
                scales=None if factors is None else torch.stack([factors[index] for index in members]),
            )
            searched += found if part.group is None else self._add(found, part)
        if first:
            counts[len(searched) :] = searched

    def _add(self, counts: Tensor, part: Part) -> Tensor:
        """The sum over the processes; the first of a selection compares their steps."""
        compare = part not in self._compared
        self._compared.append(part)
        return add_over_processes(counts, part, self.step, compare=compare)


def _combined(found: Tensor) -> PrunedCount:
    """Of one weight, from (processes, 3)."""
    zeros, largest, at_largest = found.unbind(1)
    return PrunedCount(int(zeros.sum()), float(largest.max()), int(at_largest[largest == largest.max()].sum()))
