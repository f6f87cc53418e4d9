"""Eager implementation of every op: check and allocate by the contract, then let the chosen backend fill in.

An empty result launches nothing. Raw ops have no derivative: called in grad mode on a tensor that requires grad, they
raise (in backward, or at once where they write in place) instead of losing the gradient; ``feather_kernels.functional``
holds the differentiable forms. Ops that write in place count it in the tensor's version, so that autograd notices where
it had saved the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, is_grad_enabled
from torch._C import DispatchKey, DispatchKeySet
from torch.autograd.graph import increment_version

from feather_kernels.ops import schema
from feather_kernels.ops.dispatch import backend_for, backend_for_threshold


class CallRecord:
    """Addresses of the thresholds that ``threshold`` was called with between ``start`` and ``stop``.

    The op is the one place that every forward passes through, eager, compiled or checkpointed, and every layer has a
    threshold of its own; so this is how a sparsifier finds layers whose weight is read without their forward.
    """

    active: ClassVar[list[CallRecord]] = []

    def __init__(self) -> None:
        self.addresses: set[int] = set()

    def start(self) -> None:
        """Begin to record."""
        self.active.append(self)

    def stop(self) -> None:
        """Record no more; stopping twice is harmless."""
        if self in self.active:
            self.active.remove(self)

    @classmethod
    def add(cls, t: Tensor) -> None:
        """Note a call with threshold ``t``."""
        for record in cls.active:
            record.addresses.add(t.data_ptr())


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


def scale_pruned_grad_(g: Tensor, w: Tensor, t: Tensor, grad_scale: Tensor) -> None:
    schema.scale_pruned_grad_(g, w, t, grad_scale)
    if g.numel():
        backend_for(w.device).scale_pruned_grad(g, w, t, grad_scale, g)
    increment_version(g)


def scale_fresh_grad_(g: Tensor, w: Tensor, t: Tensor, grad_scale: Tensor) -> None:
    """``scale_pruned_grad_`` of a gradient that a backward pass has just computed: whole, and seen by nobody else.

    So it is not expanded, and no version of it is counted (10 us with cold caches). The operands are checked here too:
    the scale for the first time, and the weight's data may have been replaced since forward.
    """
    schema.check_gradient(g, w, t, grad_scale)
    if g.numel():
        backend_for(w.device).scale_pruned_grad(g, w, t, grad_scale, g)


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
    "scale_pruned_grad_": scale_pruned_grad_,
    "magnitude_select": magnitude_select,
    "magnitude_histogram": magnitude_histogram,
    "count_pruned": count_pruned,
}

BELOW_AUTOGRAD = torch._C._after_autograd_keyset
# Below autograd nothing but the backend's key is left: the dispatcher would call what is in ``IMPLEMENTATIONS``, 1 us
# later. (A kernel that somebody else registers for that key is not called.)
BACKEND_ALONE = {DispatchKeySet(DispatchKey.CPU).raw_repr(), DispatchKeySet(DispatchKey.CUDA).raw_repr()}

INTEGER_RESULT = ("magnitude_histogram", "count_pruned")  # nothing to differentiate


def refuse_gradients(name: str) -> Callable:
    """Implementation of op ``name`` for the Autograd key.

    Where a gradient would be lost, an op that returns a tensor gives one whose backward raises, so that exported graphs
    run in grad mode; one that writes in place raises at once.
    """
    packet, _, overload = name.partition(".")
    in_place = bool(overload) or name.endswith("_")
    redispatch = getattr(getattr(torch.ops.feather_kernels, packet), overload or "default").redispatch
    implementation = IMPLEMENTATIONS[name]

    def autograd_kernel(keyset: DispatchKeySet, *args: Any, **kwargs: Any) -> Any:
        keys = keyset & BELOW_AUTOGRAD
        run = implementation if keys.raw_repr() in BACKEND_ALONE else partial(redispatch, keys)
        tensors = _tensors(args, kwargs) if is_grad_enabled() else ()
        differentiable = [tensor for tensor in tensors if tensor.requires_grad]
        if not differentiable:
            return run(*args, **kwargs)
        if in_place:
            raise RuntimeError(_NO_DERIVATIVE.format(name))
        return NoDerivative.apply(name, partial(run, *args, **kwargs), *differentiable)

    return autograd_kernel


_NO_DERIVATIVE = (
    "torch.ops.feather_kernels.{} has no derivative and an argument requires grad: use feather_kernels.functional, or "
    "call it under torch.no_grad()"
)


class NoDerivative(torch.autograd.Function):
    """The result of ``run()``, with a backward that raises."""

    @staticmethod
    def forward(ctx: Any, name: str, run: Callable[[], Tensor], *differentiable: Tensor) -> Tensor:  # noqa: ARG004
        """Run with grad mode off, as in any Function."""
        ctx.name = name
        return run()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:  # noqa: ARG004
        """Raise RuntimeError."""
        raise RuntimeError(_NO_DERIVATIVE.format(ctx.name))


def _tensors(args: tuple[object, ...], kwargs: dict[str, object]) -> Iterator[Tensor]:
    for argument in (*args, *kwargs.values()):
        for tensor in argument if isinstance(argument, (list, tuple)) else (argument,):
            if isinstance(tensor, Tensor):
                yield tensor
