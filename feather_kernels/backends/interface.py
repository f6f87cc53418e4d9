"""The ``Backend`` protocol, and the arguments of its ops over lists of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch
    from torch import Tensor


class Selection(NamedTuple):
    """The arguments of ``magnitude_select``, checked, with contiguous tensors but for the weights.

    Attributes:
        weights: L tensors.
        groups: the group of each tensor, in [0, G).
        rank: int64 (G,), the rank in each group.
        scales: (L,), the factor of each tensor's scores, or None for 1.
        caps: int64 (L,), how many of each tensor's smallest elements take part, or None for all.
        hint: (G, 2), the result of an earlier call, or None.
    """

    weights: Sequence[Tensor]
    groups: Sequence[int]
    rank: Tensor
    scales: Tensor | None = None
    caps: Tensor | None = None
    hint: Tensor | None = None


class Histogram(NamedTuple):
    """The arguments of ``magnitude_histogram``, checked, with contiguous tensors but for the weights.

    Attributes:
        weights: L tensors.
        groups: the group of each tensor, in [0, G).
        prefix: int64 (G,), the upper bits of the keys that are counted.
        shift: bits of a key below the digit that is counted.
        bits: of that digit.
        scales: (L,), the factor of each tensor's scores, or None for 1.
    """

    weights: Sequence[Tensor]
    groups: Sequence[int]
    prefix: Tensor
    shift: int
    bits: int
    scales: Tensor | None = None


class KeyRanges(NamedTuple):
    """The first argument of ``collect_keys``, with contiguous tensors but for the weights.

    Attributes:
        weights: L tensors.
        groups: the group of each tensor, in [0, G).
        low: int64 (G,), the least key of each group's range.
        high: int64 (G,), the greatest; a group whose low is above its high is not looked at.
        scales: (L,), the factor of each tensor's scores, or None for 1.
    """

    weights: Sequence[Tensor]
    groups: Sequence[int]
    low: Tensor
    high: Tensor
    scales: Tensor | None = None


class Backend(Protocol):
    """A module with a probe and one function per op.

    The arguments of the ops are described in ``ops/schema.py``, which checks them and allocates every ``out``. It is
    never empty.
    """

    @property
    def POWERS(self) -> frozenset[float] | None:  # noqa: N802  (a constant of the module)
        """The powers for which ``threshold`` has a kernel, or None for all."""

    def probe(self, device: torch.device) -> str | None:
        """Return None if the backend runs on ``device``, else the reason why not.

        Raises:
            RuntimeError: the reason may pass, e.g. an out-of-memory error; the next op probes again.
        """

    def threshold(self, w: Tensor, t: Tensor, p: float, out: Tensor) -> None:
        """Fill ``out`` with P(w), rounded to its dtype; ``out`` may be ``w``."""

    def scale_pruned_grad(self, g: Tensor, w: Tensor, t: Tensor, grad_scale: Tensor, out: Tensor) -> None:
        """Fill ``out`` with the scaled gradient, rounded to its dtype; ``out`` may be ``g``."""

    def magnitude_select(self, selection: Selection, out: Tensor) -> None:
        """Fill ``out`` (G, 2) with the two order statistics of each group."""

    def magnitude_histogram(self, histogram: Histogram, out: Tensor) -> None:
        """Fill ``out`` (G, 2^bits) with the counts of one radix pass."""

    def count_pruned(self, weights: Sequence[Tensor], thresholds: Sequence[Tensor], out: Tensor) -> None:
        """Fill ``out`` (L,) with the number of pruned elements of each weight."""


class CpuBackend(Backend, Protocol):
    """A backend of CPU tensors has one more function, for selections over several processes; it is no op."""

    def collect_keys(self, ranges: KeyRanges, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
        """Per group the number of keys below low (G,), the number up to high (G,), and the latter, group after group.

        All int64. The number is -1, and the group has no keys, where all keys together would be more than ``capacity``.
        """
