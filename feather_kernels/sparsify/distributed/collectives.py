"""The sums over processes, with errors that say what a training script got wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from feather_kernels.sparsify.distributed.sharding import Part


def add_over_processes(
    values: Tensor, part: Part, step: int | Tensor, *, compare: bool = True, read: bool = False
) -> Tensor:
    """The sum of ``values`` over the processes of the part.

    It also carries what each process has counted as its ``step``, unless ``compare`` is false: in the later sums of a
    search. They are compared where they can be read without waiting for a device, or if ``read`` says that the caller
    waits anyway.

    Raises:
        RuntimeError: the processes do not take part (a rank was lost, timed out, or runs other collectives), or they
            are at different steps.
    """
    import torch.distributed as dist

    try:
        rank, size = dist.get_rank(part.group), dist.get_world_size(part.group)
        payload = values.new_zeros(values.numel() + size * compare, device=part.device)
        payload[: values.numel()] = values.flatten()
        if compare:
            payload[values.numel() + rank] = step
        dist.all_reduce(payload, group=part.group)
    except (RuntimeError, ValueError) as error:  # ValueError: of a group that is gone
        raise RuntimeError(
            f"the sum over all ranks failed at step {int(step)} of the sparsifier: a rank was lost, the process group "
            "was destroyed, or a rank did something else. All ranks must call step(), finalize(), report(), refresh() "
            f"and assert_consistent() equally often; report(local=True) is for one rank alone. torch says: {error}"
        ) from error
    if compare and (read or payload.device.type == "cpu"):
        _check_steps(payload[values.numel() :].tolist(), int(step), part)
    return payload[: values.numel()].view_as(values).to(values.device)


def sum_of_parts(values: Tensor, parts: Sequence[Part], step: int | Tensor, *, read: bool = False) -> Tensor:
    """(L,) one number of each weight, summed over the processes that it is sharded over."""
    total = values.clone()
    for part in parts:
        if part.group is not None:
            index = part.indices(values.device)
            total[index] = add_over_processes(values[index], part, step, read=read)
    return total


def _check_steps(found: list[float], step: int, part: Part) -> None:
    import torch.distributed as dist

    if any(other != step for other in found):
        ranks = dist.get_process_group_ranks(part.group)
        listed = ", ".join(f"{int(other)} on rank {rank}" for rank, other in zip(ranks, found, strict=True))
        raise RuntimeError(
            f"the sparsifiers of all ranks must have counted the same number of steps, got {listed}: call step() "
            "equally often on every rank, and load the same state"
        )
