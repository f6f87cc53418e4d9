"""The functions that run when an op is called: the contract checks and allocates, the backend fills in the result.

An empty result launches nothing. Ops that write in place increment the tensor's version, so that autograd notices if it
had saved the tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from feather_kernels.backends.interface import Histogram, Selection
from feather_kernels.backends.registry import registry
from feather_kernels.ops import schema
from feather_kernels.ops.call_record import CallRecord


def threshold(w: Tensor, t: Tensor, p: float, *, out_dtype: torch.dtype | None = None) -> Tensor:
    out = schema.threshold(w, t, p, out_dtype=out_dtype)
    if CallRecord.active:
        CallRecord.add(t)
    if out.numel():
        registry.backend_for_threshold(w.device, p).threshold(w, t, p, out)
    return out


def threshold_out(w: Tensor, t: Tensor, p: float, *, out: Tensor) -> None:
    schema.threshold_out(w, t, p, out=out)
    if out.numel():
        registry.backend_for_threshold(w.device, p).threshold(w, t, p, out)
    increment_version(out)


def threshold_recompute(
    w: Tensor, t: Tensor, p: float, after: Tensor, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    out = schema.threshold_recompute(w, t, p, after, out_dtype=out_dtype)
    if out.numel():
        registry.backend_for_threshold(w.device, p).threshold(w, t, p, out)
    return out


def scale_pruned_grad(
    g: Tensor, w: Tensor, t: Tensor, grad_scale: Tensor, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    out = schema.scale_pruned_grad(g, w, t, grad_scale, out_dtype=out_dtype)
    if out.numel():
        registry.backend_for(w.device).scale_pruned_grad(g, w, t, grad_scale, out)
    return out


def magnitude_select(*arguments: Any, **optional: Any) -> Tensor:
    out = schema.magnitude_select(*arguments, **optional)
    if out.numel():
        registry.backend_for(out.device).magnitude_select(_contiguous(Selection(*arguments, **optional)), out)
    return out


def magnitude_histogram(*arguments: Any, **optional: Any) -> Tensor:
    out = schema.magnitude_histogram(*arguments, **optional)
    if out.numel():
        registry.backend_for(out.device).magnitude_histogram(_contiguous(Histogram(*arguments, **optional)), out)
    return out


def count_pruned(weights: Sequence[Tensor], thresholds: Sequence[Tensor]) -> Tensor:
    out = schema.count_pruned(weights, thresholds)
    registry.backend_for(out.device).count_pruned(weights, thresholds, out)
    return out


Arguments = TypeVar("Arguments", Selection, Histogram)


def _contiguous(arguments: Arguments) -> Arguments:
    return type(arguments)._make(x.contiguous() if isinstance(x, Tensor) else x for x in arguments)
