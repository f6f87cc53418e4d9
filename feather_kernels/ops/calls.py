"""The ops as autograd's Functions call them: straight, unless something may be listening at the dispatcher.

A call by way of ``torch.ops`` costs 4 us more than the implementation itself, and several times that with cold caches,
three times a layer and step. Tracers, modes, transforms, the profiler and tensors that are not plain get the op; an
``ExecutionTraceObserver`` without a profiler is not noticed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from feather_kernels.ops.eager import IMPLEMENTATIONS

KINDS = (Tensor, Parameter)  # no subclasses


def unobserved() -> bool:
    """Whether nothing could see an op pass the dispatcher."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._dispatch_tls_is_dispatch_key_included(torch._C.DispatchKey.PreDispatch)
        or torch._C._are_functorch_transforms_active()
        or torch._C._autograd._profiler_enabled()
    )


def is_plain(tensor: Tensor) -> bool:
    """Whether it is strided and has memory of its own: no subclass, no batch of vmap, no lazy negation or zeros."""
    return type(tensor) in KINDS and torch._C._dispatch_keys(tensor).raw_repr() in _PLAIN


def _keys(device: str) -> int:
    keys = torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, device))
    for name in ("ADInplaceOrView", f"Autograd{device}", f"Autocast{device}"):
        keys = keys.add(getattr(torch._C.DispatchKey, name))
    return keys.raw_repr()


_PLAIN = {_keys("CPU"), _keys("CUDA")}


def by_shortest_way(name: str) -> Callable[..., Any]:
    """Op ``name``, for calls where autograd records nothing."""
    op = getattr(torch.ops.feather_kernels, name).default
    implementation = IMPLEMENTATIONS[name]

    def call(*args: Any, **options: Any) -> Any:
        straight = unobserved() and all(is_plain(argument) for argument in args if isinstance(argument, Tensor))
        return (implementation if straight else op)(*args, **options)

    return call


threshold = by_shortest_way("threshold")
threshold_recompute = by_shortest_way("threshold_recompute")
scale_pruned_grad = by_shortest_way("scale_pruned_grad")
scale_pruned_grad_ = by_shortest_way("scale_pruned_grad_")
