"""All private and deprecated names of torch that the package uses, each with a fallback for versions without it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.overrides
from torch import Tensor, nn
from torch.autograd import forward_ad


def _outside_of_compilers() -> bool:
    return not torch.compiler.is_compiling()


transforms_active: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", _outside_of_compilers)
"""Whether a torch.func transform is active. If torch does not say: True in eager code, which costs 15 us a call."""

in_transform: Callable[[], bool] = getattr(torch._C, "_are_functorch_transforms_active", lambda: False)
"""Whether a torch.func transform is active. If torch does not say: False."""

tracing: Callable[[], bool] = getattr(torch.jit, "is_tracing", lambda: False)
"""Whether torch.jit.trace, or the ONNX exporter that is built on it, is recording."""

_fake_mode: Callable[[list[Tensor]], object] = getattr(torch._guards, "detect_fake_mode", lambda _: None)


def is_fake(tensor: Tensor) -> bool:
    """Return whether the tensor, or what is computed from it now, holds no values (FakeTensorMode)."""
    return _fake_mode([tensor]) is not None


_norms: Callable[..., tuple[Tensor, ...]] | None = getattr(torch, "_foreach_norm", None)


def norms_of(tensors: list[Tensor], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Return ``||x||`` of each tensor, computed in ``dtype``, by one call for all of them if torch has it.

    On CUDA it sums in another order than ``torch.linalg.vector_norm``: last bits may differ, but not from run to run.
    """
    if _norms is None:
        return tuple(torch.linalg.vector_norm(tensor, dtype=dtype) for tensor in tensors)
    return _norms(tensors, 2, dtype=dtype)


_graph_task: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)


def in_backward() -> bool:
    """Return whether this thread is inside a backward pass; False if torch does not say."""
    return _graph_task() != -1


if getattr(forward_ad, "_current_level", None) is None:
    forward_mode_active = _outside_of_compilers
else:

    def forward_mode_active() -> bool:
        """Return whether a level of forward-mode differentiation is open; if torch does not say, True in eager code."""
        return forward_ad._current_level >= 0


def constant_for_compilers(function: Callable[[Any], None]) -> Callable[[Any], None]:
    """Mark a function so that torch.compile and strict exports call it while they trace, on the real objects.

    ``torch.compiler.assume_constant_result`` does the same, but imports the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


_functorch = getattr(torch._C, "_functorch", None)
_is_wrapped: Callable[[Tensor], bool] | None = getattr(_functorch, "is_functorch_wrapped_tensor", None)
_is_batched: Callable[[Tensor], bool] | None = getattr(_functorch, "is_batchedtensor", None)
_unwrap: Callable[[Tensor], Tensor] | None = getattr(_functorch, "get_unwrapped", None)


def outside_transforms(tensor: Tensor) -> tuple[Tensor | None, bool]:
    """Return the tensor inside the wrappers of torch.func (None if torch does not say), and whether vmap batches it."""
    if _is_wrapped is None or _is_batched is None or _unwrap is None:
        return None if in_transform() else tensor, False
    batched = False
    while _is_wrapped(tensor):
        batched = batched or _is_batched(tensor)
        tensor = _unwrap(tensor)
    return tensor, batched


def without_transforms() -> AbstractContextManager[Any]:
    """Return a context in which the active transforms of torch.func do not see what is computed.

    Raises:
        RuntimeError: a transform is active, and this version of torch offers no such context.
    """
    if not in_transform():
        return nullcontext()
    from torch._functorch import pyfunctorch

    clear = getattr(pyfunctorch, "temporarily_clear_interpreter_stack", None)
    if clear is None:
        raise RuntimeError("this version of torch cannot select thresholds of other weights inside of torch.func")
    return clear()


outside_compilers: Callable[[Any], Any] = getattr(torch, "_disable_dynamo", lambda function: function)
"""Makes compilers leave a function to Python. ``torch.compiler.disable`` does the same, but imports the compiler."""

_function_mode: Callable[[], Any] | None = getattr(torch.overrides, "_get_current_function_mode", None)


def is_innermost(mode: Any) -> bool:
    """Return whether the torch function mode is the innermost active one; True if torch does not say."""
    return _function_mode is None or _function_mode() is mode


def is_managed_by_fsdp(module: nn.Module) -> bool:
    """Whether FSDP (1 or 2) shards a Parameter of the module outside of its forward."""
    return "_is_fsdp_managed_module" in module.__dict__


def has_compiled_parts(model: nn.Module) -> bool:
    """Return whether a module of the model is compiled."""
    return any(
        getattr(module, "_compiled_call_impl", None) is not None or type(module).__name__ == "OptimizedModule"
        for module in model.modules()
    )
