"""The reference backend: plain PyTorch on any device, written to be read. All other backends are tested against it.

Formulas are evaluated in the compute dtype (float64 for float64 weights, else float32) and rounded once, on the final
copy into ``out``. Nothing here reads a tensor on the host, sorts, or concatenates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from operator import itemgetter
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from feather_kernels.backends import radix
from feather_kernels.backends.layouts import storage_order
from feather_kernels.dtypes import BITS_DTYPE, NAN_KEY, compute_dtype

if TYPE_CHECKING:
    from feather_kernels.backends.interface import Histogram, KeyRanges, Selection

POWERS = None  # all
MANTISSA_BITS = {torch.float32: 23, torch.float64: 52}
EXPONENT_BIAS = {torch.float32: 127, torch.float64: 1023}
CHUNK = 1 << 18  # elements handled at a time: bounds the extra memory and stays in the cache
MOST_COPIES, COPIED_BINS = 64, 1 << 17  # copies of a bin on CUDA, and of all bins together: 1 MB


def probe(device: torch.device) -> str | None:
    """Return None, except for meta tensors: any device with storage works."""
    return "meta tensors have no data" if device.type == "meta" else None


# ---------------------------------------------------------------------------------------------- elementwise ops


def threshold(w: Tensor, t: Tensor, p: float, out: Tensor) -> None:
    """Fill ``out`` with P(w), chunk by chunk."""
    for out_chunk, w_chunk in _chunks(out, w):
        out_chunk.copy_(_threshold(w_chunk.to(t.dtype), t, p))


def scale_pruned_grad(g: Tensor, w: Tensor, t: Tensor, grad_scale: Tensor, out: Tensor) -> None:
    """Fill ``out`` with the scaled straight-through gradient, chunk by chunk."""
    for out_chunk, g_chunk, w_chunk in _chunks(out, g, w):
        out_chunk.copy_(scaled_gradient(g_chunk, w_chunk, t, grad_scale))


def scaled_gradient(g: Tensor, w: Tensor, t: Tensor, grad_scale: Tensor) -> Tensor:
    """``g * (1 where kept, grad_scale where pruned)`` in the wider of g's and w's compute dtypes."""
    gradient = g.to(torch.promote_types(g.dtype, t.dtype))
    return torch.where(_pruned(w.to(t.dtype), t), gradient * grad_scale, gradient)


def _pruned(weight: Tensor, t: Tensor) -> Tensor:
    """The one predicate of the package; ``weight`` in the dtype of t."""
    return (t > 0) & (weight.abs() <= t)


def _threshold(weight: Tensor, t: Tensor, p: float) -> Tensor:
    """``P(w) = sign(w) (abs(w)^p - T^p)^(1/p)`` where kept, +0.0 where pruned; T <= 0 is the identity."""
    if p == 1:
        value = torch.copysign(weight.abs() - t, weight)
    elif p in (2, 3):
        value = _root_of_difference(weight, t, int(p))
    elif p == math.inf:
        value = weight
    else:
        value = _general_power(weight.double(), t.double(), p).to(t.dtype)
    value = torch.copysign(torch.minimum(value.abs(), weight.abs()), weight)  # rounding must not make a weight larger
    value = torch.where(torch.isnan(t), t, value)
    value = torch.where(_pruned(weight, t), 0.0, value)
    return torch.where(t <= 0, weight, value)


def _root_of_difference(weight: Tensor, t: Tensor, p: int) -> Tensor:
    """``sign(w) (a^p - T^p)^(1/p)`` for p = 2, 3 within 2 ulp: scaled, factored, root with one correction.

    A power of two S brings T into [1, 2): exact, so ``x - T`` is as exact as ``a - T`` and no power of x over- or
    underflows. The root is z^(1/p) = z u with u = z^(1/p - 1), and one Newton step removes the error of ``pow``.
    Beyond ``far`` the result rounds to w itself.
    """
    scale, unscale = _power_of_two_scale(t)
    x, ts = weight.abs() * scale, t * scale
    bits = MANTISSA_BITS[t.dtype]
    far = x > 2.0 ** math.ceil((bits + 2 + p) / p)  # there (T/a)^p / p < 2^-(bits + 2), a quarter of the last place
    z = (x - ts) * (x + ts if p == 2 else x * (x + ts) + ts * ts)
    z = torch.where((x <= ts) | far, 1.0, z)
    if p == 2:
        y = z.sqrt()
    else:
        u = z.pow(-1 / 3).square()
        y = z * u
        y = y + (z - y * y * y) * (u * (1 / 3))
    return torch.where(far, weight, torch.copysign(y * unscale, weight))


def _power_of_two_scale(t: Tensor) -> tuple[Tensor, Tensor]:
    """(S, 1/S), powers of two with S T in [1, 2) for normal T; the exponent is clamped to the normal range."""
    mantissa_bits, bias = MANTISSA_BITS[t.dtype], EXPONENT_BIAS[t.dtype]
    exponent = (t.view(BITS_DTYPE[t.dtype]) >> mantissa_bits) & (2 * bias + 1)
    exponent = (2 * bias - exponent).clamp(1, 2 * bias - 1)
    return (exponent << mantissa_bits).view(t.dtype), ((2 * bias - exponent) << mantissa_bits).view(t.dtype)


def _general_power(weight: Tensor, t: Tensor, p: float) -> Tensor:
    """``w (1 - (T/a)^p)^(1/p)`` in float64; log1p and expm1 keep it exact near T, where ``a - T`` is exact."""
    a = weight.abs()
    kept = ~(a <= t)
    relative = torch.where(kept, (a - t) / a, 0.5)
    fraction = -torch.expm1(p * torch.log1p(-relative))
    return torch.where(torch.isinf(a), weight, weight * _inverse_power(fraction, p))


def _inverse_power(z: Tensor, p: float) -> Tensor:
    """``z^(1/p)``, float64: with z = m 2^k and k = n p + r the exponential's argument stays below 1.

    p is split into 24 bits and a rest, so that k - n p is exact.
    """
    fraction, exponent = math.frexp(p)
    high = math.ldexp(round(math.ldexp(fraction, 24)), exponent - 24)
    m, k = torch.frexp(z)
    k = k.double()
    n = torch.floor(k / p + 0.5)
    return torch.ldexp(torch.exp((k - n * high - n * (p - high)) / p * math.log(2) + m.log() / p), n)


# ---------------------------------------------------------------------------------------------- selection, counts


def magnitude_select(selection: Selection, out: Tensor) -> None:
    """Fill ``out`` (G, 2) by radix selection with the passes below; a hint cannot save this backend any work."""
    radix.select(selection, out, magnitude_histogram, _smallest_key_above)


def magnitude_histogram(histogram: Histogram, out: Tensor) -> None:
    """Fill ``out`` (G, 2^bits) with digit counts by an integer scatter-add.

    Keys under another prefix go to extra bins that are dropped.
    """
    weights, groups, prefix, shift, bits, scales = histogram
    one = torch.ones((), dtype=torch.int64, device=out.device)
    copies, dropped = _copies(bits) if _adds_atomically(out.device) else (1, 1)
    counts = out.new_empty((copies << bits) + dropped)
    out.zero_()
    for group, pairs in groupby(_keys(weights, groups, scales), itemgetter(0)):
        counts.zero_()
        for _, key in pairs:
            digit = (key >> shift) & ((1 << bits) - 1)
            inside = (key >> (shift + bits)) == prefix[group].to(key.dtype)
            bins = _spread_bins(digit, inside, copies, bits) if dropped > 1 else torch.where(inside, digit, 1 << bits)
            counts.index_add_(0, bins, one.expand(bins.numel()))
        out[group] += counts[:-dropped].view(-1, copies).sum(1)


def collect_keys(ranges: KeyRanges, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count and collect the keys inside ranges; see ``CpuBackend``."""
    weights, groups, low, high, scales = ranges
    below, inside = torch.zeros_like(low), torch.zeros_like(low)
    kept: list[list[Tensor]] = [[] for _ in low]
    for group, key in _keys(weights, groups, scales):
        if low[group] <= high[group]:
            below[group] += torch.count_nonzero(key < low[group])
            kept[group].append(key[(key >= low[group]) & (key <= high[group])].long())
    keys, count = [low.new_empty(0)], 0
    for group, found in enumerate(kept):
        inside[group] = sum(map(len, found))
        if count + int(inside[group]) > capacity:
            inside[group] = -1
            continue
        count += int(inside[group])
        keys += found
    return below, inside, torch.cat(keys)


def _adds_atomically(device: torch.device) -> bool:
    """Whether additions to one address wait for each other on the device."""
    return device.type == "cuda"


def _copies(bits: int) -> tuple[int, int]:
    """Copies of each bin, a power of two, and bins for dropped keys: so many that few keys of a chunk share one."""
    return max(1, min(MOST_COPIES, COPIED_BINS >> bits)), CHUNK


def _spread_bins(digit: Tensor, inside: Tensor, copies: int, bits: int) -> Tensor:
    """Bin of each key: a copy of its digit's, by its place in the chunk; if not ``inside``, a bin of its own."""
    place = torch.arange(digit.numel(), dtype=digit.dtype, device=digit.device)
    return torch.where(inside, digit * copies + (place & (copies - 1)), (copies << bits) + (place & (CHUNK - 1)))


def count_pruned(weights: Sequence[Tensor], thresholds: Sequence[Tensor], out: Tensor) -> None:
    """Fill ``out`` (L,) with the number of pruned elements of each weight, counted chunk by chunk."""
    out.zero_()
    for index, (w, t) in enumerate(zip(weights, thresholds, strict=True)):
        for (chunk,) in _chunks(w):
            out[index] += torch.count_nonzero(_pruned(chunk.to(t.dtype), t))


def _smallest_key_above(selection: Selection, rows: Sequence[int], keys: Tensor) -> Tensor:
    """Per row the smallest key greater than keys[row], or the NaN key where there is none."""
    nan_key = NAN_KEY[compute_dtype(selection.weights[0].dtype)]
    result = torch.full_like(keys, nan_key)
    for row, key in _keys(selection.weights, rows, selection.scales):
        smallest = torch.where(key > keys[row].to(key.dtype), key, nan_key).amin()
        result[row] = torch.minimum(result[row], smallest)
    return result


def _keys(weights: Sequence[Tensor], rows: Sequence[int], scales: Tensor | None) -> Iterator[tuple[int, Tensor]]:
    """Each row and integer keys of its scores, chunk by chunk; ascending keys are ascending scores, NaN last."""
    dtype = compute_dtype(weights[0].dtype)
    for index, (w, row) in enumerate(zip(weights, rows, strict=True)):
        for (chunk,) in _chunks(w):
            score = chunk.to(dtype).abs().reshape(-1)
            if scales is not None:
                score = (score * scales[index]).abs()  # abs again: a NaN product may carry a sign bit
            yield row, score.view(BITS_DTYPE[dtype]).clamp_max(NAN_KEY[dtype])


def _chunks(first: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Matching 1-dim pieces of tensors of one shape, at most CHUNK elements each, in the storage order of the first.

    Pieces of a dense ``first`` are views, so they can be written to; a tensor that is not dense in that order is
    copied once. If ``first`` itself is not dense the whole tensors are the one piece.
    """
    order = storage_order(first)
    tensors = [tensor.detach().permute(order) for tensor in (first, *others)]
    if not tensors[0].is_contiguous():
        yield tuple(tensors)
    elif first.numel():
        yield from zip(*(tensor.reshape(-1).split(CHUNK) for tensor in tensors), strict=True)
