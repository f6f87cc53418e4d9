"""Radix selection by passes over the weights that a backend supplies; reads nothing on the host."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from feather_kernels.backends.device_constants import device_constant
from feather_kernels.backends.interface import Histogram, Selection
from feather_kernels.dtypes import BITS_DTYPE, NAN_KEY

RADIX_BITS = {torch.float32: (11, 10, 10), torch.float64: (11, 10, 10, 11, 11, 10)}  # of 31 and 63 bits, top first

CountDigits = Callable[[Histogram, Tensor], None]
SmallestAbove = Callable[[Selection, Sequence[int], Tensor], Tensor]


def select(selection: Selection, out: Tensor, count_digits: CountDigits, smallest_above: SmallestAbove) -> None:
    """Radix selection, most significant digit first: histogram, cumulative count, digit of the wanted rank.

    With caps every tensor has a histogram row of its own and a group's cumulative count is ``sum_l min(C_l, caps_l)``,
    the count in the union of the caps_l smallest elements of each tensor; without caps a row is a whole group.

    Args:
        selection: what to select.
        out: (G, 2), filled with the two order statistics of each group.
        count_digits: ``count_digits(histogram, counts)`` is a ``magnitude_histogram`` whose groups are rows.
        smallest_above: ``smallest_above(selection, rows, keys)`` returns for each row the smallest key above keys (R,),
            or the NaN key; rows has the row of each tensor.
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

    def capped(count: Tensor) -> Tensor:
        """(R, n) counts in rows -> (G, n) counts in the capped union of each group."""
        total = count.new_zeros((group_count, *count.shape[1:]))
        return total.index_add_(0, group_of_row, torch.minimum(count, row_cap[:, None]))

    prefix = torch.zeros_like(rank)
    below = torch.zeros_like(group_of_row)  # number of the row's keys that are smaller than the prefix
    sizes = None
    shift = sum(RADIX_BITS[out.dtype])
    for bits in RADIX_BITS[out.dtype]:
        shift -= bits
        counts = out.new_empty((len(group_of_row), 1 << bits), dtype=torch.int64)
        count_digits(Histogram(weights, rows, prefix[group_of_row], shift, bits, scales), counts)
        counts = counts.cumsum(1) + below[:, None]
        sizes = capped(counts[:, -1:]) if sizes is None else sizes
        digit = (capped(counts) <= rank[:, None]).sum(1).clamp_max((1 << bits) - 1)
        row_digit = digit[group_of_row][:, None]
        below = torch.where(row_digit > 0, counts.gather(1, (row_digit - 1).clamp_min(0)), below[:, None])[:, 0]
        prefix = (prefix << bits) | digit

    at_most = counts.gather(1, row_digit)  # number of the row's keys that are smaller or equal
    above = smallest_above(selection, rows, prefix[group_of_row])
    above = torch.where(at_most[:, 0] < row_cap, above, NAN_KEY[out.dtype])
    following = torch.full_like(prefix, NAN_KEY[out.dtype]).scatter_reduce_(0, group_of_row, above, "amin")
    size, next_rank = sizes[:, 0], rank + 1  # type: ignore[index]
    same = (next_rank < capped(at_most)[:, 0]) | (next_rank >= size)
    following = torch.where(same, prefix, following)
    values = _value_of_key(torch.stack((prefix, following), 1), out.dtype)
    out.copy_(torch.where(((rank >= 0) & (rank < size))[:, None], values, math.nan))


def _value_of_key(key: Tensor, dtype: torch.dtype) -> Tensor:
    value = key.to(BITS_DTYPE[dtype]).view(dtype)
    return torch.where(key >= NAN_KEY[dtype], math.nan, value)
