"""The ops as autograd's Functions call them: straight, unless something may be listening at the dispatcher.

A call by way of ``torch.ops`` costs 4 us more than the implementation itself, and several times that with cold caches,
three times a layer and step. Tracers, modes, transforms, tensor subclasses, meta tensors and the profiler get the op.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from feather_kernels.ops.eager import IMPLEMENTATIONS

PLAIN = (Tensor, Parameter)


def unobserved() -> bool:
    """Whether nothing could see an op pass the dispatcher."""
    return not (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
        or torch.autograd._profiler_enabled()
    )


def by_shortest_way(name: str) -> Callable[..., Any]:
    """Op ``name``, for calls where autograd records nothing; its first two arguments are tensors."""
    op = getattr(torch.ops.feather_kernels, name).default
    implementation = IMPLEMENTATIONS[name]

    def call(first: Tensor, second: Tensor, *args: Any, **options: Any) -> Any:
        if type(first) in PLAIN and type(second) in PLAIN and not first.is_meta and unobserved():
            return implementation(first, second, *args, **options)
        return op(first, second, *args, **options)

    return call


threshold = by_shortest_way("threshold")
threshold_recompute = by_shortest_way("threshold_recompute")
scale_pruned_grad = by_shortest_way("scale_pruned_grad")
scale_pruned_grad_ = by_shortest_way("scale_pruned_grad_")
