"""What is asked of the weights: order statistics, norms and counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from feather_kernels.torch_private import norms_of

if TYPE_CHECKING:
    from feather_kernels.backends.interface import Selection

ops = torch.ops.feather_kernels


@dataclass(frozen=True)
class PrunedCount:
    """What is pruned of one weight.

    ``at_largest`` counts the elements that have the ``largest`` pruned score; several magnitudes may round to one.
    """

    zeros: int
    largest: float
    at_largest: int


class Statistics(Protocol):
    """Of weights that are whole in this process (``WHOLE_WEIGHTS``), or parts of which live in others."""

    def select(self, selection: Selection) -> Tensor:
        """As the op ``magnitude_select``, over the whole weights; its ``weights`` are what this process has of them."""

    def norms(self, weights: list[Tensor], dtype: torch.dtype) -> Tensor:
        """(L,) ``||w||`` of the whole weights, in ``dtype``."""

    def combine(self, counts: list[PrunedCount]) -> list[PrunedCount]:
        """What is pruned of the whole weights, from what this process counted."""


class _WholeWeights:
    """Statistics of weights that this process has."""

    @staticmethod
    def select(selection: Selection) -> Tensor:
        """See ``Statistics``."""
        weights, groups, rank, scales, caps, hint = selection
        return ops.magnitude_select.default(weights, groups, rank, scales=scales, caps=caps, hint=hint)

    @staticmethod
    def norms(weights: list[Tensor], dtype: torch.dtype) -> Tensor:
        """See ``Statistics``."""
        return torch.stack(norms_of(weights, dtype))

    @staticmethod
    def combine(counts: list[PrunedCount]) -> list[PrunedCount]:
        """See ``Statistics``."""
        return counts


WHOLE_WEIGHTS: Statistics = _WholeWeights()
