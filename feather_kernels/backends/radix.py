"""Radix selection by passes over the weights that a backend supplies; reads nothing on the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from feather_kernels.backends.device_constants import device_constant
from feather_kernels.backends.interface import Histogram, Selection
from feather_kernels.dtypes import BITS_DTYPE, NAN_KEY

RADIX_BITS = {torch.float32: (11, 10, 10), torch.float64: (11, 10, 10, 11, 11, 10)}  # of 31 and 63 bits, top first

CountDigits = Callable[[Histogram, Tensor], None]
SmallestAbove = Callable[[Selection, Sequence[int], Tensor], Tensor]


class Found(NamedTuple):
    """Where the wanted ranks lie.

    Attributes:
        keys: (G,) the key at each group's rank; meaningless for a rank outside of its group.
        sizes: (G,) elements of each group that take part.
        row_of_tensor: the row in which each tensor is counted.
        group_of_row, row_cap: (R,) of each row.
        at_most: (R,) keys of each row that are smaller than its group's or equal.
    """

    keys: Tensor
    sizes: Tensor
    row_of_tensor: Sequence[int]
    group_of_row: Tensor
    row_cap: Tensor
    at_most: Tensor

    def capped(self, counts: Tensor) -> Tensor:
        """(R,) counts in rows -> (G,) counts in the capped union of each group."""
        return _capped(counts[:, None], self.group_of_row, self.row_cap, len(self.keys))[:, 0]


def select(selection: Selection, out: Tensor, count_digits: CountDigits, smallest_above: SmallestAbove) -> None:
    """The key of the wanted rank, and the next: equal to it, or the smallest above.

    ``smallest_above(selection, rows, keys)`` gives, per row, the smallest key above keys (R,), or the NaN key; rows:
    the row of each tensor.
    """
    rank, nan_key = selection.rank, NAN_KEY[out.dtype]
    found = find(selection, out.dtype, count_digits)
    above = smallest_above(selection, found.row_of_tensor, found.keys[found.group_of_row])
    above = torch.where(found.at_most < found.row_cap, above, nan_key)
    following = torch.full_like(found.keys, nan_key).scatter_reduce_(0, found.group_of_row, above, "amin")
    same = (rank + 1 < found.capped(found.at_most)) | (rank + 1 >= found.sizes)
    out.copy_(values_at(rank, found.sizes, found.keys, torch.where(same, found.keys, following), out.dtype))


def find(selection: Selection, dtype: torch.dtype, count_digits: CountDigits) -> Found:
    """Radix search, most significant digit first: histogram, cumulative count, digit of the wanted rank.

    With caps every tensor has a histogram row of its own and a group's cumulative count is ``sum_l min(C_l, caps_l)``,
    the count in the union of the caps_l smallest elements of each tensor; without caps a row is a whole group.

    Args:
        selection: what to search for; its hint is not used.
        dtype: of the result.
        count_digits: ``count_digits(histogram, counts)`` is a ``magnitude_histogram`` whose groups are rows.
    """
    weights, groups, rank, scales, caps, _ = selection
    group_count = rank.numel()
    if caps is None:
        rows, group_of_row = groups, torch.arange(group_count, device=rank.device)
        row_cap = torch.full_like(group_of_row, torch.iinfo(torch.int64).max)
    else:
        listed = tuple(groups)
        group_of_row = device_constant(
            ("groups", *listed), rank.device, lambda: torch.tensor(listed, dtype=torch.int64, device="cpu")
        )
        rows, row_cap = range(len(groups)), caps

    prefix = torch.zeros_like(rank)
    below = torch.zeros_like(group_of_row)  # number of the row's keys that are smaller than the prefix
    sizes = None
    shift = sum(RADIX_BITS[dtype])
    for bits in RADIX_BITS[dtype]:
        shift -= bits
        counts = rank.new_empty((len(group_of_row), 1 << bits))
        count_digits(Histogram(weights, rows, prefix[group_of_row], shift, bits, scales), counts)
        counts = counts.cumsum(1) + below[:, None]
        if sizes is None:
            sizes = _capped(counts[:, -1:], group_of_row, row_cap, group_count)[:, 0]
        up_to = _capped(counts, group_of_row, row_cap, group_count)
        digit = (up_to <= rank[:, None]).sum(1).clamp_max((1 << bits) - 1)
        row_digit = digit[group_of_row][:, None]
        below = torch.where(row_digit > 0, counts.gather(1, (row_digit - 1).clamp_min(0)), below[:, None])[:, 0]
        prefix = (prefix << bits) | digit
    assert sizes is not None
    return Found(prefix, sizes, rows, group_of_row, row_cap, counts.gather(1, row_digit)[:, 0])


def values_at(rank: Tensor, sizes: Tensor, keys: Tensor, following: Tensor, dtype: torch.dtype) -> Tensor:
    """(G, 2) the scores that have these keys; NaN for a rank outside of its group."""
    values = _value_of_key(torch.stack((keys, following), 1), dtype)
    return torch.where(((rank >= 0) & (rank < sizes))[:, None], values, math.nan)


def _capped(counts: Tensor, group_of_row: Tensor, row_cap: Tensor, group_count: int) -> Tensor:
    """(R, n) counts in rows -> (G, n) counts in the capped union of each group."""
    total = counts.new_zeros((group_count, *counts.shape[1:]))
    return total.index_add_(0, group_of_row, torch.minimum(counts, row_cap[:, None]))


def _value_of_key(key: Tensor, dtype: torch.dtype) -> Tensor:
    value = key.to(BITS_DTYPE[dtype]).view(dtype)
    return torch.where(key >= NAN_KEY[dtype], math.nan, value)
