"""The steady state of a sharded selection on CPUs: one scan of the weights, and two small sums.

From one step to the next a threshold moves little. A bracket of keys around the last result (the hint) most likely
holds the next one. Every process counts its keys below the bracket and collects the few inside; the order statistics of
these are found by two digits, of which every process counts its own keys.

The hint is a sum's result, so all processes have the same bracket, and the sums tell all of them alike whether it holds
what is wanted. If not, nothing is lost but the scan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from feather_kernels.backends.interface import KeyRanges
from feather_kernels.backends.radix import values_at
from feather_kernels.dtypes import BITS_DTYPE, NAN_KEY

if TYPE_CHECKING:
    from torch import Tensor

    from feather_kernels.backends.interface import Selection

CAPACITY = 1 << 17  # keys that a process collects: 1 MB
WIDTH = 1 << 13  # float32 keys on either side of the hint: 2^-11 to 2^-10 of its value
REACH = 1 << 26  # elements below the threshold from which the bracket narrows
DIGIT_BITS = (9, 8)  # of a key's distance from the bracket's low end, top first

CollectKeys = Callable[..., tuple["Tensor", "Tensor", "Tensor"]]
Add = Callable[["Tensor"], "Tensor"]


class Collected(NamedTuple):
    """What this process has of each group: keys below low, -1 or the number of keys inside, and which those are."""

    low: Tensor
    below: Tensor
    inside: Tensor
    offsets: Tensor  # (keys,) above the low end of the group's bracket
    group: Tensor  # (keys,)


def select(collect_keys: CollectKeys, selection: Selection, hint: Tensor, add: Add) -> Tensor | None:
    """As ``magnitude_select``; None in all processes if the bracket of a group does not hold both of its elements.

    ``collect_keys`` is the backend's; the selection, without caps, is of this process's parts, and ``hint`` its hint;
    ``add(counts)`` sums int64 counts over the processes.
    """
    rank = selection.rank
    wanted = rank >= 0
    if bool((wanted & ~(hint[:, 0] > 0)).any()):  # NaN: no result yet
        return None
    found = _collect(collect_keys, selection, hint)
    coarse_bins, fine_bins = (1 << bits for bits in DIGIT_BITS)
    coarse_of_key = found.offsets >> DIGIT_BITS[1]
    coarse = _count(found, coarse_of_key, coarse_bins)
    total = add(torch.cat((torch.stack((found.below, (found.inside < 0).long()), 1), coarse), 1))
    below, refused, up_to = total[:, 0], total[:, 1], total[:, 2:].cumsum(1)
    place = rank - below
    held = (refused == 0) & (place >= 0) & (place + 1 < up_to[:, -1])
    if not bool((held | ~wanted).all()):
        return None
    places = torch.stack((place, place + 1))
    coarse_digit = (up_to[None] <= places[:, :, None]).sum(2).clamp_max(coarse_bins - 1)  # (2, G)
    before = torch.where(coarse_digit > 0, up_to.gather(1, (coarse_digit - 1).clamp_min(0).t()).t(), 0)
    under = [torch.where(coarse_of_key == digit[found.group], found.offsets, -1) for digit in coarse_digit]
    fine = torch.stack([_count(found, offsets, fine_bins) for offsets in under])
    up_to = add(fine).cumsum(2)
    fine_digit = (up_to <= (places - before)[:, :, None]).sum(2).clamp_max(fine_bins - 1)
    key, following = found.low + (coarse_digit << DIGIT_BITS[1]) + fine_digit
    return values_at(torch.where(wanted, 0, -1), torch.ones_like(rank), key, following, hint.dtype)


def _collect(collect_keys: CollectKeys, selection: Selection, hint: Tensor) -> Collected:
    """The keys inside the brackets; groups without a wanted rank have none."""
    rank = selection.rank
    reach = sum(DIGIT_BITS)
    key = hint.contiguous().view(BITS_DTYPE[hint.dtype]).long().clamp(0, NAN_KEY[hint.dtype])
    width = WIDTH // (rank.clamp_min(0) // REACH + 1)
    low = (key[:, 0] - width).clamp_min(0)
    high = torch.minimum(key[:, 1] + width, low + (1 << reach) - 1).clamp_max(NAN_KEY[hint.dtype])
    high = torch.where(rank >= 0, high, low - 1)
    ranges = KeyRanges(selection.weights, selection.groups, low, high, selection.scales)
    below, inside, keys = collect_keys(ranges, CAPACITY)
    group = torch.arange(len(rank), dtype=torch.int64, device="cpu").repeat_interleave(inside.clamp_min(0))
    return Collected(low, below, inside, keys - low[group], group)


def _count(found: Collected, digit: Tensor, bins: int) -> Tensor:
    """(G, bins) how often each digit occurs in each group; of a distance its lowest digit, -1 does not count."""
    kept = digit >= 0
    place = found.group[kept] * bins + (digit[kept] & (bins - 1))
    return torch.bincount(place, minlength=len(found.low) * bins).view(-1, bins)
