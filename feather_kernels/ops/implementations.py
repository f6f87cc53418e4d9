"""What runs when an op is called: check and allocate by the contract, then let the chosen backend fill in.

An empty result launches nothing. Ops that write in place count it in the tensor's version, so that autograd notices
where it had saved the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from feather_kernels.ops import schema
from feather_kernels.ops.call_record import CallRecord
from feather_kernels.ops.dispatch import backend_for, backend_for_threshold


def threshold(w: Tensor, t: Tensor, p: float, *, out_dtype: torch.dtype | None = None) -> Tensor:
    out = schema.threshold(w, t, p, out_dtype=out_dtype)
    if CallRecord.active:
        CallRecord.add(t)
    if out.numel():
        backend_for_threshold(w.device, p).threshold(w, t, p, out)
    return out


def threshold_out(w: Tensor, t: Tensor, p: float, *, out: Tensor) -> None:
    schema.threshold_out(w, t, p, out=out)
    if out.numel():
        backend_for_threshold(w.device, p).threshold(w, t, p, out)
    increment_version(out)


def threshold_recompute(
    w: Tensor, t: Tensor, p: float, after: Tensor, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    out = schema.threshold_recompute(w, t, p, after, out_dtype=out_dtype)
    if out.numel():
        backend_for_threshold(w.device, p).threshold(w, t, p, out)
    return out


def scale_pruned_grad(
    g: Tensor, w: Tensor, t: Tensor, grad_scale: Tensor, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    out = schema.scale_pruned_grad(g, w, t, grad_scale, out_dtype=out_dtype)
    if out.numel():
        backend_for(w.device).scale_pruned_grad(g, w, t, grad_scale, out)
    return out


def magnitude_select(
    weights: Sequence[Tensor],
    groups: Sequence[int],
    rank: Tensor,
    *,
    scales: Tensor | None = None,
    caps: Tensor | None = None,
    hint: Tensor | None = None,
) -> Tensor:
    out = schema.magnitude_select(weights, groups, rank, scales=scales, caps=caps, hint=hint)
    if out.numel():
        backend_for(rank.device).magnitude_select(weights, groups, rank, scales, caps, hint, out)
    return out


def magnitude_histogram(
    weights: Sequence[Tensor],
    groups: Sequence[int],
    prefix: Tensor,
    shift: int,
    bits: int,
    *,
    scales: Tensor | None = None,
) -> Tensor:
    out = schema.magnitude_histogram(weights, groups, prefix, shift, bits, scales=scales)
    if out.numel():
        backend_for(prefix.device).magnitude_histogram(weights, groups, prefix, shift, bits, scales, out)
    return out


def count_pruned(weights: Sequence[Tensor], thresholds: Sequence[Tensor]) -> Tensor:
    out = schema.count_pruned(weights, thresholds)
    backend_for(out.device).count_pruned(weights, thresholds, out)
    return out


IMPLEMENTATIONS: dict[str, Callable] = {
    "threshold": threshold,
    "threshold.out": threshold_out,
    "threshold_recompute": threshold_recompute,
    "scale_pruned_grad": scale_pruned_grad,
    "magnitude_select": magnitude_select,
    "magnitude_histogram": magnitude_histogram,
    "count_pruned": count_pruned,
}
