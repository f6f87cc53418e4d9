"""What several processes can get wrong is an error that says so, in time."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import nn

import feather_kernels as fk
from tests.distributed.models import make_model, optimizer_of, own_batch, shard, train_step
from tests.distributed.processes import Processes


def message_of(call: Any, *args: Any) -> str:
    with pytest.raises((RuntimeError, ValueError)) as raised:
        call(*args)
    return str(raised.value)


def sharded_pair(**options: Any) -> tuple[nn.Sequential, fk.Sparsifier]:
    model = make_model()
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=4, **options)
    shard(model)
    return model, sparsifier


def load_another_step() -> str:
    import torch.distributed as dist

    _, sparsifier = sharded_pair()
    if dist.get_rank() == 1:
        sparsifier.load_state_dict({**sparsifier.state_dict(), "step": 2})
    return message_of(sparsifier.step)


def test_ranks_at_different_steps_are_named(processes: Processes) -> None:
    for message in processes.run(load_another_step):
        assert "the same number of steps, got 1 on rank 0, 3 on rank 1" in message


def step_more_often() -> str:
    import torch.distributed as dist

    model, sparsifier = sharded_pair()
    optimizer = optimizer_of(model)
    train_step(model, optimizer, own_batch(0))
    if dist.get_rank() == 0:
        return message_of(sparsifier.step)
    with pytest.raises(RuntimeError):  # torch's own: another collective than that of rank 0
        train_step(model, optimizer, own_batch(1))
    return ""


def test_a_rank_that_steps_more_often_gets_an_error(processes: Processes) -> None:
    message = processes.run(step_more_often, timeout=5)[0]
    assert "All ranks must call step(), finalize(), report(), refresh() and assert_consistent() equally" in message


def lose_a_rank() -> str:
    import torch.distributed as dist

    _, sparsifier = sharded_pair()
    sparsifier.step()
    if dist.get_rank() == 1:
        os._exit(1)
    return message_of(sparsifier.step)


def test_a_lost_rank_is_an_error_on_the_others(processes: Processes) -> None:
    (good, message), (ended_well, _) = processes.answers(lose_a_rank, timeout=5)
    assert good, message
    assert not ended_well
    assert "failed at step 2 of the sparsifier: a rank was lost" in message


def lose_the_group() -> str:
    import torch.distributed as dist

    _, sparsifier = sharded_pair()
    sparsifier.step()
    dist.destroy_process_group()
    return message_of(sparsifier.step)


def test_a_group_that_is_gone_is_an_error(processes: Processes) -> None:
    for good, message in processes.answers(lose_the_group):
        assert good, message
        assert "the process group was destroyed" in message
    processes.stop()


def refuse(how: str) -> str:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    model: Any = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    mesh = init_device_mesh("cpu", (2,))
    if how == "function":
        fully_shard(model, mesh=mesh)
        return message_of(lambda: fk.Sparsifier(model, 0.5, 4, scope=lambda weights, sparsity: torch.zeros(())))
    if how == "outside":
        sparsifier = fk.Sparsifier(model[0], schedule=fk.ConstantSchedule(0.5))
        fully_shard(model, mesh=mesh, reshard_after_forward=False)
        model(torch.ones(2, 8))
        return message_of(sparsifier.step)
    if how == "FSDP1 before":
        model = FullyShardedDataParallel(model, device_id=torch.device("cpu"))
        return message_of(lambda: fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5)))
    if how == "parallel before":
        parallelize_module(model, mesh, {"0": ColwiseParallel()})
        return message_of(lambda: fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5)))
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5))
    if how == "parallel after, forward":
        parallelize_module(model, mesh, {"0": ColwiseParallel()})
        return message_of(model, torch.ones(2, 8))
    if how == "FSDP1 after":
        FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=True)
    else:
        parallelize_module(model, mesh, {"0": ColwiseParallel()})
        if how == "both":
            fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    return message_of(sparsifier.step)


WORKS = "Use DistributedDataParallel, or FSDP2 (torch.distributed.fsdp.fully_shard)"


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("function", "scope must be a name where weights are sharded, got <function"),
        ("outside", "managed by an FSDP module outside of the model that was made sparse"),
        ("FSDP1 before", "a flat shard"),
        ("FSDP1 after", "a flat shard"),
        ("parallel before", "weight of 0 is a DTensor with placements (Shard(dim=0),), as tensor parallelism makes"),
        ("parallel after", "weight of 0 is a DTensor with placements (Shard(dim=0),), as tensor parallelism makes"),
        ("parallel after, forward", "weight of 0 is a DTensor with placements (Shard(dim=0),), as tensor parallelism"),
    ],
)
def test_what_cannot_be_trained_names_what_can(processes: Processes, how: str, reason: str) -> None:
    for message in processes.run(refuse, how):
        assert reason in message
        assert how == "function" or WORKS in message


def differ(what: str) -> str:
    import torch.distributed as dist

    model = make_model()
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=4)
    sparsifier.assert_consistent()
    with torch.no_grad():
        if what == "weight" and dist.get_rank() == 1:
            model[3][0].weight[0, 0] += 1e-6
        elif what == "step" and dist.get_rank() == 1:
            sparsifier.step()
    return message_of(sparsifier.assert_consistent)


@pytest.mark.parametrize(
    ("what", "named"),
    [("weight", "rank 1: layer 3.0 (21, 252) has sum of the weight's bits"), ("step", "rank 1: step 1, not 0")],
)
def test_ranks_that_differ_are_named_with_their_layer(processes: Processes, what: str, named: str) -> None:
    for message in processes.run(differ, what):
        assert named in message
        assert "rank 0" not in message
