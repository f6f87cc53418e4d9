"""Whether a weight has memory of its own, and a checksum of its bits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn import Parameter

from feather_kernels.torch_private import is_fake


@torch.no_grad()
def checksum(weights: Sequence[Tensor | None]) -> Tensor | None:
    """Sums of the weights' bits, int64 (weights,), exact in any order; None if a weight has no values here."""
    if not all(map(has_memory, weights)):
        return None
    held = cast("Sequence[Tensor]", weights)
    if any(weight.device.type == "meta" for weight in held) or is_fake(held[0]):
        return None
    return sums_of_bits(held)


def sums_of_bits(weights: Sequence[Tensor]) -> Tensor:
    """int64 (weights,), on the device of the first."""
    words = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    first = weights[0].device
    return torch.stack([w.view(words[w.element_size()]).sum(dtype=torch.int64).to(first) for w in weights])


def has_memory(parameter: Tensor | None) -> bool:
    """Whether this is a Parameter whose own memory holds its values, and no sharded or functional wrapper."""
    return isinstance(parameter, Parameter) and not hasattr(parameter, "__tensor_flatten__")
