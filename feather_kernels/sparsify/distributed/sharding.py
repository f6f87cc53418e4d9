"""Which weights are sharded, over which processes, and what this process has of them."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch

from feather_kernels.backends.device_constants import device_constant
from feather_kernels.nn.dtensor import computing_device, is_dtensor
from feather_kernels.torch_private import is_managed_by_fsdp

if TYPE_CHECKING:
    from torch import nn

    from feather_kernels.sparsify.prunable import PrunableWeight

WORKS = "Use DistributedDataParallel, or FSDP2 (torch.distributed.fsdp.fully_shard)"


class Part(NamedTuple):
    """Weights that are sharded over the same processes.

    Attributes:
        weights: their indices.
        group: the process group; None for weights that every process has whole.
        device: where the group communicates.
    """

    weights: tuple[int, ...]
    group: Any
    device: torch.device

    def indices(self, device: torch.device) -> torch.Tensor:
        """The indices as int64 on a device, where they stay: no step uploads them again."""
        return device_constant(
            ("part", *self.weights), device, lambda: torch.tensor(self.weights, dtype=torch.int64, device="cpu")
        )


def reshard(modules: Iterable[nn.Module]) -> bool:
    """Have the FSDP2 modules among these hold their sharded weights; whether there is one.

    After a forward without backward, or with ``reshard_after_forward=False``, the layers hold whole weights that the
    optimizer does not write to. Runs no collective, but the next forward gathers the weights again: call it in all
    processes.
    """
    fsdp_module = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    found = [] if fsdp_module is None else [module for module in modules if isinstance(module, fsdp_module)]
    for module in found:
        cast("Any", module).reshard()
    return bool(found)


def parts_of(weights: Sequence[PrunableWeight]) -> list[Part] | None:
    """The weights by the processes that they are sharded over, in one order in all processes; None if all are whole.

    Raises:
        RuntimeError: a weight is sharded, but not by FSDP2.
    """
    parameters = [weight.parameter for weight in weights]
    if not any(map(is_dtensor, parameters)):
        return None
    import torch.distributed as dist

    groups: dict[tuple[int, ...], tuple[Any, torch.device]] = {}
    members: dict[tuple[int, ...], list[int]] = {}
    for index, (weight, parameter) in enumerate(zip(weights, parameters, strict=True)):
        check_sharding(weight)
        group = _shard_group(parameter) if is_dtensor(parameter) else None
        ranks = () if group is None else tuple(dist.get_process_group_ranks(group))
        groups.setdefault(ranks, (group, computing_device(parameter)))
        members.setdefault(ranks, []).append(index)
    return [Part(tuple(members[ranks]), *groups[ranks]) for ranks in members]


def check_sharding(weight: PrunableWeight) -> None:
    """Raise RuntimeError if the weight is sharded, but not by FSDP2 over one dimension of its mesh."""
    parameter: Any = weight.parameter
    if not is_dtensor(parameter):
        return
    sharding = _sharding_dimensions(parameter)
    shards = all(parameter.placements[dimension].is_shard() for dimension in sharding)
    if len(sharding) > 1 or not shards or not all(is_managed_by_fsdp(use.module) for use in weight.uses):
        raise RuntimeError(
            f"the weight of {weight.name} is a DTensor with placements {tuple(parameter.placements)}, as tensor "
            f"parallelism makes them; its layer cannot compute with that. {WORKS} alone"
        )


def _shard_group(parameter: Any) -> Any:
    """The process group of the dimension of the mesh that shards; None if the weight is replicated."""
    sharding = _sharding_dimensions(parameter)
    return parameter.device_mesh.get_group(sharding[0]) if sharding else None


def _sharding_dimensions(parameter: Any) -> list[int]:
    """The dimensions of the mesh over which the weight is not replicated."""
    return [dimension for dimension, placement in enumerate(parameter.placements) if not placement.is_replicate()]


def hint_at_fsdp1(model: nn.Module) -> str:
    """For the error of a model without layers to prune: FSDP1 takes the weights away from the layers."""
    if not any("FullyShardedDataParallel" in (kind.__name__ for kind in type(m).__mro__) for m in model.modules()):
        return ""
    return f"; FullyShardedDataParallel holds the weights as a flat shard outside of their layers. {WORKS}"
