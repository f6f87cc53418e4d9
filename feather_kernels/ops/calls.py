"""The ops as autograd's Functions call them: by the shortest way on which nothing is lost.

A call by way of ``torch.ops`` costs 2 us more than the implementation itself with warm caches and 30 us more with cold
ones (a pass over 100 MB before each call), three times a layer and step; so ops are called past the dispatcher unless
something may be listening there. To ask which way to take costs 1 us warm and 20 us cold, so a backward pass asks once.
Functions of torch are bound to names here: to look one up through ``torch._C`` touches memory that is no longer cached.
Tracers, modes, transforms, the profiler and tensors that are not plain get the op; an ``ExecutionTraceObserver``
without a profiler is not noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _are_functorch_transforms_active,
    _dispatch_keys,
    _dispatch_tls_is_dispatch_key_included,
    _len_torch_dispatch_stack,
    _len_torch_function_stack,
)
from torch._C._autograd import _profiler_enabled
from torch.compiler import is_dynamo_compiling
from torch.nn import Parameter

from feather_kernels.ops.eager import IMPLEMENTATIONS, scale_fresh_grad_

KINDS = (Tensor, Parameter)  # no subclasses
PRE_DISPATCH = DispatchKey.PreDispatch


def _keys(device: str) -> int:
    keys = DispatchKeySet(getattr(DispatchKey, device))
    for name in ("ADInplaceOrView", f"Autograd{device}", f"Autocast{device}"):
        keys = keys.add(getattr(DispatchKey, name))
    return keys.raw_repr()


PLAIN = {_keys("CPU"), _keys("CUDA")}  # dispatch keys of strided tensors with memory of their own, and of nothing else


def something_listens() -> bool:
    """Whether an op could be seen to pass the dispatcher."""
    return bool(
        is_dynamo_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _dispatch_tls_is_dispatch_key_included(PRE_DISPATCH)
        or _are_functorch_transforms_active()
        or _profiler_enabled()
    )


def are_plain(tensors: tuple[Tensor | None, ...]) -> bool:
    """Whether the tensors' memory holds their values.

    It does not for subclasses, lazy negations and zeros, meta tensors and what vmap and functionalization wrap; some of
    these look like any other tensor from outside, with an address that is not theirs.
    """
    for tensor in tensors:
        if tensor is not None and not (type(tensor) in KINDS and _dispatch_keys(tensor).raw_repr() in PLAIN):
            return False
    return True


class Way(NamedTuple):
    """The ops that a layer's Function needs, each by one way of calling it."""

    threshold: Callable[..., Tensor]
    threshold_recompute: Callable[..., Tensor]
    scale_pruned_grad: Callable[..., Tensor]
    scale_fresh_grad_: Callable[..., None]
    convolution_backward: Callable[..., Any]


OURS = torch.ops.feather_kernels
CONVOLUTION_BACKWARD = torch.ops.aten.convolution_backward.default

DISPATCHED = Way(
    OURS.threshold.default,
    OURS.threshold_recompute.default,
    OURS.scale_pruned_grad.default,
    OURS.scale_pruned_grad_.default,
    CONVOLUTION_BACKWARD,
)
# torch's op is dispatched on every way; ``_op`` is without the Python of its overload, and nothing that Dynamo traces
STRAIGHT = Way(
    IMPLEMENTATIONS["threshold"],
    IMPLEMENTATIONS["threshold_recompute"],
    IMPLEMENTATIONS["scale_pruned_grad"],
    scale_fresh_grad_,
    CONVOLUTION_BACKWARD._op,
)


def way(*tensors: Tensor | None) -> Way:
    """The shortest way on which nothing is lost, for ops on these tensors where autograd records nothing."""
    if something_listens() or not are_plain(tensors):
        return DISPATCHED
    return STRAIGHT
