"""What is asked of the weights: order statistics, norms and counts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from feather_kernels.torch_private import norms_of


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

    def select(
        self,
        weights: Sequence[Tensor],
        groups: Sequence[int],
        rank: Tensor,
        *,
        scales: Tensor | None,
        caps: Tensor | None,
        hint: Tensor | None,
    ) -> Tensor:
        """As the op ``magnitude_select``, over the whole weights; ``weights`` is what this process has of them."""

    def norms(self, weights: list[Tensor], dtype: torch.dtype) -> Tensor:
        """(L,) ``||w||`` of the whole weights, in ``dtype``."""

    def combine(self, counts: list[PrunedCount]) -> list[PrunedCount]:
        """What is pruned of the whole weights, from what this process counted."""


class _WholeWeights:
    """Statistics of weights that this process has."""

    select = staticmethod(torch.ops.feather_kernels.magnitude_select.default)

    @staticmethod
    def norms(weights: list[Tensor], dtype: torch.dtype) -> Tensor:
        """See ``Statistics``."""
        return torch.stack(norms_of(weights, dtype))

    @staticmethod
    def combine(counts: list[PrunedCount]) -> list[PrunedCount]:
        """See ``Statistics``."""
        return counts


WHOLE_WEIGHTS: Statistics = _WholeWeights()
