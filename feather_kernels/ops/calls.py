"""The ops as autograd's Functions call them: straight, unless something may be listening at the dispatcher.

A call by way of ``torch.ops`` costs 2 us more than the implementation itself with warm caches and 60 us more with cold
ones (a pass over 190 MB before each call), three times a layer and step. Functions of torch are bound to names here: to
look one up through ``torch._C`` touches memory that is no longer cached. Tracers, modes, transforms, the profiler and
tensors that are not plain get the op; an ``ExecutionTraceObserver`` without a profiler is not noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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

from feather_kernels.ops.eager import IMPLEMENTATIONS

KINDS = (Tensor, Parameter)  # no subclasses
PRE_DISPATCH = DispatchKey.PreDispatch


def _keys(device: str) -> int:
    keys = DispatchKeySet(getattr(DispatchKey, device))
    for name in ("ADInplaceOrView", f"Autograd{device}", f"Autocast{device}"):
        keys = keys.add(getattr(DispatchKey, name))
    return keys.raw_repr()


PLAIN = {_keys("CPU"), _keys("CUDA")}  # dispatch keys of strided tensors with memory of their own, and of nothing else


def can_go_straight(*args: Any) -> bool:
    """Whether nothing could see an op pass the dispatcher, and the tensors' memory holds their values.

    It does not for subclasses, lazy negations and zeros, meta tensors and what vmap and grad wrap.
    """
    if (
        is_dynamo_compiling()
        or _len_torch_dispatch_stack()
        or _len_torch_function_stack()
        or _dispatch_tls_is_dispatch_key_included(PRE_DISPATCH)
        or _are_functorch_transforms_active()
        or _profiler_enabled()
    ):
        return False
    for argument in args:
        if isinstance(argument, Tensor) and not (
            type(argument) in KINDS and _dispatch_keys(argument).raw_repr() in PLAIN
        ):
            return False
    return True


def by_shortest_way(name: str) -> Callable[..., Any]:
    """Op ``name``, for calls where autograd records nothing."""
    op = getattr(torch.ops.feather_kernels, name).default
    implementation = IMPLEMENTATIONS[name]

    def call(*args: Any, **options: Any) -> Any:
        return (implementation if can_go_straight(*args) else op)(*args, **options)

    return call


threshold = by_shortest_way("threshold")
threshold_recompute = by_shortest_way("threshold_recompute")
scale_pruned_grad = by_shortest_way("scale_pruned_grad")
scale_pruned_grad_ = by_shortest_way("scale_pruned_grad_")
