"""Counts of what is pruned in sharded weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from feather_kernels.sparsify.distributed.collectives import add_over_processes

if TYPE_CHECKING:
    from torch import Tensor

    from feather_kernels.sparsify.distributed.sharding import Part


def gather_counts(own: Tensor, parts: Sequence[Part], step: int | Tensor) -> list[Tensor]:
    """For each weight what every process counted in its part, (processes, n); one row where all have the whole weight.

    Args:
        own: (weights, n), float64: what this process counted.
        parts: the weights by the processes that they are sharded over.
        step: what the sparsifier has counted.
    """
    import torch.distributed as dist

    found: list[Tensor] = list(own.unsqueeze(1))
    for part in parts:
        if part.group is not None:
            index = part.indices(own.device)
            slots = own.new_zeros((dist.get_world_size(part.group), len(index), own.shape[1]))
            slots[dist.get_rank(part.group)] = own[index]
            gathered = add_over_processes(slots, part, step, read=True).unbind(1)
            for weight, counts in zip(part.weights, gathered, strict=True):
                found[weight] = counts
    return found
