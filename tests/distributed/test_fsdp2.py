"""Training under FSDP2: exact thresholds in every step, and the weights of one process within rounding."""

from __future__ import annotations

import math
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import feather_kernels as fk
from tests.distributed.models import (
    PRUNABLE,
    alone,
    batch,
    gathered,
    make_model,
    optimizer_of,
    own_batch,
    prunable,
    shard,
    train_step,
    zeros_in,
)
from tests.distributed.processes import Processes

STEPS = 20
BUDGET = math.floor((sum(PRUNABLE) - 1) * 0.8) + 1


def train_alone() -> tuple[Tensor, list[Tensor]]:
    """Thresholds of all steps and the final weights of one process."""
    model = make_model()
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=STEPS)
    optimizer, thresholds = optimizer_of(model), []
    for step in range(STEPS):
        train_step(model, optimizer, batch(step))
        sparsifier.step()
        thresholds.append(sparsifier.threshold.clone())
    sparsifier.finalize()
    return torch.stack(thresholds), gathered(model)


def train_sharded(first: str) -> tuple[Tensor, list[Tensor], list[str]]:
    """On its part of each batch; every threshold is compared with that of the gathered weights."""
    model = make_model()
    if first == "shard":
        shard(model)
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=STEPS)
    if first == "sparsify":
        shard(model)
    optimizer, thresholds = optimizer_of(model), []
    for step in range(STEPS):
        train_step(model, optimizer, own_batch(step))
        sparsifier.step()
        thresholds.append(sparsifier.threshold.clone())
        assert sparsifier.threshold.equal(alone(gathered(model), sparsifier.sparsity).threshold), step
    model.eval()
    before = model(batch(0)[0])
    assert sparsifier.finalize() is model
    torch.testing.assert_close(model(batch(0)[0]), before)
    return torch.stack(thresholds), gathered(model), [type(module).__name__ for module in model.modules()]


@pytest.mark.parametrize(("world", "first"), [(2, "sparsify"), (2, "shard"), (4, "sparsify")])
def test_twenty_steps_follow_one_process(processes: Processes, world: int, first: str) -> None:
    thresholds, weights = train_alone()
    for found, found_weights, classes in processes.run(train_sharded, first, world=world):
        torch.testing.assert_close(found, thresholds, rtol=1e-4, atol=1e-6)
        assert zeros_in(found_weights) == BUDGET
        assert (classes[0], classes[1], classes[-1]) == ("FSDPSequential", "Conv2d", "FSDPLinear")
        for sharded, one in zip(found_weights, weights, strict=True):
            close = torch.isclose(sharded, one, rtol=1e-3, atol=1e-5)
            assert close.float().mean() > 0.995  # the others crossed the threshold for a rounded gradient


POLICIES: dict[str, dict[str, Any]] = {
    "layer": {"scope": "layer"},
    "erk": {"scope": "erk"},
    "min_density": {"min_density": 0.25},
    "fan": {"score_scale": "fan"},
    "overrides": {"overrides": {"3.0": {"sparsity": 0.95}, "4": {"min_density": 0.5}}},
}


def follow_policy(options: dict[str, Any]) -> None:
    model = make_model()
    shard(model)
    sparsifier = fk.Sparsifier(model, sparsity=0.7, total_steps=4, **options)
    optimizer = optimizer_of(model)
    for step in range(4):
        train_step(model, optimizer, own_batch(step))
        sparsifier.step()
        schedule = fk.CubicSchedule(0.7, 0, 2)
        one = make_model()
        with torch.no_grad():
            for own, weight in zip(prunable(one), gathered(model), strict=True):
                own.copy_(weight)
        twin = fk.Sparsifier(one, schedule=schedule, **options)
        for _ in range(step + 1):
            twin.step()
        assert sparsifier.state_dict()["thresholds"].equal(twin.state_dict()["thresholds"]), step
        assert [asdict(layer) for layer in sparsifier.report().layers] == [asdict(x) for x in twin.report().layers]
        sparsifier.assert_consistent()


@pytest.mark.parametrize("name", POLICIES)
def test_policies_count_whole_weights(processes: Processes, name: str) -> None:
    processes.run(follow_policy, POLICIES[name], world=4 if name == "min_density" else 2)


def follow_setup(name: str) -> int:
    """Few steps with evaluations between them, after which FSDP may leave whole weights in the layers."""
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

    setups: dict[str, dict[str, Any]] = {
        "whole after forward": {"reshard_after_forward": False},
        "fewer processes after forward": {"reshard_after_forward": 2},
        "offloaded": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
        "bfloat16": {"mp_policy": MixedPrecisionPolicy(param_dtype=torch.bfloat16)},
    }
    how = setups.get(name, {})
    if name == "HSDP":
        how = {"mesh": init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))}
    model = make_model()
    if name == "checkpointed":
        model[3] = checkpoint_wrapper(model[3])
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=4)
    shard(model, **how)
    if name == "compiled":
        model[3].compile(backend="aot_eager")
    optimizer = optimizer_of(model)
    for step in range(4):
        train_step(model, optimizer, own_batch(step))
        if step % 2:
            with torch.no_grad():
                model(own_batch(0)[0])
        sparsifier.step()
        assert sparsifier.threshold.equal(alone(gathered(model), sparsifier.sparsity).threshold), step
        with torch.no_grad():
            model.eval()(own_batch(0)[0])
        model.train()
        assert sparsifier.report().zeros == alone(gathered(model), sparsifier.sparsity).report().zeros
    with torch.no_grad():
        model(own_batch(0)[0])
    sparsifier.assert_consistent()
    sparsifier.finalize()
    return zeros_in(gathered(model))


SETUPS = ("whole after forward", "offloaded", "bfloat16", "checkpointed", "compiled")


@pytest.mark.parametrize(
    ("name", "world"), [*((name, 2) for name in SETUPS), ("HSDP", 4), ("fewer processes after forward", 4)]
)
def test_setups_of_fsdp2(processes: Processes, name: str, world: int) -> None:
    assert processes.run(follow_setup, name, world=world) == [BUDGET] * world


def several_meshes() -> None:
    """A layer that all four processes share, two that pairs share, and one that every process has whole."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_model()
    pairs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=2)
    fully_shard(model[3], mesh=pairs)
    fully_shard(model[0], mesh=init_device_mesh("cpu", (4,)))
    fully_shard(model, mesh=pairs, ignored_params=set(model[4].parameters()))
    optimizer = optimizer_of(model)
    for step in range(2):
        train_step(model, optimizer, batch(step))  # the same on all: nobody sums the ignored gradients
        sparsifier.step()
        one = alone(gathered(model), sparsifier.sparsity)
        assert sparsifier.threshold.equal(one.threshold)
        assert [asdict(layer) for layer in sparsifier.report().layers] == [asdict(x) for x in one.report().layers]
    assert not hasattr(prunable(model)[-1], "placements")
    sparsifier.finalize()
    assert zeros_in(gathered(model)) == BUDGET


def test_several_meshes_in_one_model(processes: Processes) -> None:
    processes.run(several_meshes, world=4)


def one_rank_looks() -> Any:
    """Rank 0 alone reports, evaluates stale weights and saves; the others go on."""
    import torch.distributed as dist

    model = make_model()
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=4)
    shard(model, reshard_after_forward=False)
    optimizer = optimizer_of(model)
    train_step(model, optimizer, own_batch(0))
    sparsifier.step()
    with torch.no_grad():
        model(own_batch(1)[0])  # leaves whole weights in the root's layers
    local = sparsifier.report(local=True) if dist.get_rank() == 0 else None
    if dist.get_rank() == 0:
        model.eval()
        sparsifier.state_dict()
    before = sparsifier.threshold.clone()
    train_step(model, optimizer, own_batch(1))
    model(own_batch(2)[0])  # stale everywhere
    assert sparsifier.threshold.equal(before)
    sparsifier.step()
    model.train()
    both = sparsifier.report(local=True), sparsifier.report()
    return local, both


def test_one_rank_may_look_alone(processes: Processes) -> None:
    answers = processes.run(one_rank_looks)
    assert answers[0][0].numel < sum(PRUNABLE)
    local = [answer[1][0] for answer in answers]
    whole = [answer[1][1] for answer in answers]
    assert whole[0] == whole[1]
    assert sum(report.numel for report in local) == whole[0].numel == sum(PRUNABLE)
    assert sum(report.zeros for report in local) == whole[0].zeros
    assert {layer.shape for report in local for layer in report.layers if layer.name == "3.0"} == {(11, 252), (10, 252)}


def initialise_later() -> None:
    """A model that is built without memory, sharded, and initialised in place."""
    with torch.device("meta"):
        model = make_model()
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.8))
    shard(model)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    assert sparsifier.threshold == 0
    sparsifier.refresh()
    assert sparsifier.threshold.equal(alone(gathered(model), 0.8).threshold)
    assert sparsifier.report().zeros == BUDGET
    assert sparsifier.threshold.dtype == torch.float32


def test_models_that_are_initialised_after_sharding(processes: Processes) -> None:
    processes.run(initialise_later)
