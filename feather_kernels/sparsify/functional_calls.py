"""Thresholds for forwards on weights that are not the model's own (``torch.func.functional_call``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from feather_kernels.nn.thresholds import ThresholdBinding
from feather_kernels.sparsify.after_forward import after_forward
from feather_kernels.torch_private import outside_transforms, without_transforms


def plain_weights(held: Sequence[Tensor | None]) -> list[Tensor] | None:
    """The tensors inside of torch.func's wrappers; None for sharded weights, which are left alone.

    Raises:
        RuntimeError: a batch of weights, of which each would need a threshold of its own.
    """
    plain = []
    for weight in held:
        if weight is None:
            return None
        inner, batched = outside_transforms(weight)
        if batched:
            raise RuntimeError(
                "a sparse model cannot run on a batch of weights (vmap over stack_module_state): every member has "
                "thresholds of its own. Call the members one by one, or finalize() a copy of each first"
            )
        if inner is None or hasattr(inner, "__tensor_flatten__"):
            return None
        plain.append(inner)
    return plain


def lend(
    module: nn.Module, bindings: Sequence[ThresholdBinding], select: Callable[[], Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Give the layers other thresholds until the forward of ``module`` that is about to run has ended.

    Args:
        module: the model.
        bindings: one per use of a weight.
        select: returns the (uses,) thresholds; called outside of the transforms that are active.

    Returns:
        The own and the lent threshold of every use.
    """
    with without_transforms(), torch.inference_mode(False), torch.no_grad():
        lent = select().contiguous().unbind()
        own = [(binding.value, binding.grad_scale) for binding in bindings]
        for binding, value in zip(bindings, lent, strict=True):
            binding.value = value
            if binding.grad_scale is not None and binding.grad_scale.device != value.device:
                binding.grad_scale = torch.full_like(value, binding.thresholds.grad_scales[binding.index])

    def give_back() -> None:
        for binding, (value, grad_scale) in zip(bindings, own, strict=True):
            binding.value, binding.grad_scale = value, grad_scale

    after_forward(module, give_back)
    return [(value, other) for (value, _), other in zip(own, lent, strict=True)]
