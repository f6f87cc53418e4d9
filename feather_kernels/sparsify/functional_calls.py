"""Lends thresholds to forwards on weights that are not the model's own (``torch.func.functional_call``)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from feather_kernels.torch_private import outside_transforms, without_transforms

if TYPE_CHECKING:
    from feather_kernels.nn.thresholds import ThresholdBinding


def plain_weights(held: Sequence[Tensor | None]) -> list[Tensor] | None:
    """The tensors inside torch.func's wrappers, or None if there are none to select from (sharded weights).

    Raises:
        RuntimeError: a weight is a batch of weights; each would need a threshold of its own.
    """
    plain = []
    for weight in held:
        if weight is None:
            return None
        inner, batched = outside_transforms(weight)
        if batched:
            raise RuntimeError(
                "a sparse model cannot run on a batch of weights (vmap over stack_module_state), because every member "
                "has its own thresholds: call the members one by one, or finalize() a copy of each first"
            )
        if inner is None or hasattr(inner, "__tensor_flatten__"):
            return None
        plain.append(inner)
    return plain


def lend(bindings: Sequence[ThresholdBinding], select: Callable[[], Tensor]) -> tuple[list[Tensor], Callable[[], None]]:
    """Give the layers other thresholds for a while.

    Args:
        bindings: one per use of a weight.
        select: returns the thresholds to lend, (uses,); it is called outside of torch.func's transforms.

    Returns:
        The lent thresholds, and a function that gives the layers their own back.
    """
    with without_transforms(), torch.inference_mode(False), torch.no_grad():
        lent = list(select().contiguous().unbind())
        own = [(binding.value, binding.grad_scale) for binding in bindings]
        for binding, value in zip(bindings, lent, strict=True):
            binding.value = value
            if binding.grad_scale is not None and binding.grad_scale.device != value.device:
                binding.grad_scale = torch.full_like(value, binding.thresholds.grad_scales[binding.index])

    def give_back() -> None:
        for binding, (value, grad_scale) in zip(bindings, own, strict=True):
            binding.value, binding.grad_scale = value, grad_scale

    return lent, give_back
