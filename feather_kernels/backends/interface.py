"""What a backend defines, and the arguments of its ops over lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Selection(NamedTuple):
    """Arguments of ``magnitude_select`` (ops/schema.py): checked, all but the weights contiguous."""

    weights: Sequence[Tensor]
    groups: Sequence[int]
    rank: Tensor
    scales: Tensor | None = None
    caps: Tensor | None = None
    hint: Tensor | None = None


class Histogram(NamedTuple):
    """Arguments of ``magnitude_histogram``, likewise."""

    weights: Sequence[Tensor]
    groups: Sequence[int]
    prefix: Tensor
    shift: int
    bits: int
    scales: Tensor | None = None


class Backend(Protocol):
    """A backend is a module with a probe and one function per op; every ``out`` is allocated by the contract."""

    @property
    def POWERS(self) -> frozenset[float] | None:  # noqa: N802  (a constant of the module)
        """Powers that ``threshold`` has, or None for all."""

    def probe(self, device: torch.device) -> str | None:
        """None if the backend runs on ``device``, else the reason why not."""

    def threshold(self, w: Tensor, t: Tensor, p: float, out: Tensor) -> None:
        """Fill ``out`` with P(w), rounded to its dtype; out may be w."""

    def scale_pruned_grad(self, g: Tensor, w: Tensor, t: Tensor, grad_scale: Tensor, out: Tensor) -> None:
        """Fill ``out`` with the scaled gradient, rounded to its dtype; out may be g."""

    def magnitude_select(self, selection: Selection, out: Tensor) -> None:
        """Fill ``out`` (G, 2) with the two order statistics of each group."""

    def magnitude_histogram(self, histogram: Histogram, out: Tensor) -> None:
        """Fill ``out`` (G, 2^bits) with the counts of one radix pass."""

    def count_pruned(self, weights: Sequence[Tensor], thresholds: Sequence[Tensor], out: Tensor) -> None:
        """Fill ``out`` (L,) with the number of pruned elements of each weight."""
