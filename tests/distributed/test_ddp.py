"""DistributedDataParallel: all ranks have whole weights, and select without a collective."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import feather_kernels as fk
from tests.distributed.models import (
    alone,
    batch,
    gathered,
    make_model,
    optimizer_of,
    own_batch,
    train_step,
    zeros_in,
)
from tests.distributed.processes import Processes
from tests.distributed.test_fsdp2 import BUDGET, train_alone

STEPS = 20


def train_replicated(first: str, options: dict[str, Any]) -> tuple[Tensor, list[Tensor]]:
    """Rank 1 begins with other weights, which DDP replaces by those of rank 0."""
    import torch.distributed as dist

    model = make_model()
    if dist.get_rank() == 1:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(2)
    if first == "sparsify":
        sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=STEPS)
        parallel = DistributedDataParallel(model, **options)
    else:
        parallel = DistributedDataParallel(model, **options)
        sparsifier = fk.Sparsifier(parallel, sparsity=0.8, total_steps=STEPS)
    optimizer, thresholds = optimizer_of(parallel), []
    for step in range(STEPS):
        train_step(parallel, optimizer, own_batch(step))
        sparsifier.step()
        thresholds.append(sparsifier.threshold.clone())
        if dist.get_rank() == 0:  # an evaluation on one rank, on weights that have changed once more
            with torch.no_grad():
                model.eval()(batch(0)[0])
                sparsifier.report()
            model.train()
    sparsifier.assert_consistent()
    sparsifier.finalize()
    return torch.stack(thresholds), gathered(model)


@pytest.mark.parametrize("first", ["sparsify", "wrap"])
@pytest.mark.parametrize(
    "options", [{}, {"static_graph": True, "gradient_as_bucket_view": True}], ids=["plain", "static graph"]
)
def test_twenty_steps_follow_one_process(processes: Processes, first: str, options: dict[str, Any]) -> None:
    thresholds, weights = train_alone()
    ranks = processes.run(train_replicated, first, options)
    for found, found_weights in ranks:
        assert found.equal(ranks[0][0])
        torch.testing.assert_close(found, thresholds, rtol=1e-4, atol=1e-6)
        assert zeros_in(found_weights) == BUDGET
        for own, of_first, one in zip(found_weights, ranks[0][1], weights, strict=True):
            assert own.equal(of_first)
            assert torch.isclose(own, one, rtol=1e-3, atol=1e-5).float().mean() > 0.995


def accumulate() -> None:
    model = make_model()
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=3)
    parallel = DistributedDataParallel(model)
    optimizer = optimizer_of(parallel)
    for step in range(3):
        with parallel.no_sync():
            torch.nn.functional.cross_entropy(parallel(own_batch(step)[0]), own_batch(step)[1]).backward()
        train_step(parallel, optimizer, own_batch(step + 10))
        sparsifier.step()
        assert sparsifier.threshold.equal(alone(gathered(model), sparsifier.sparsity).threshold)
    sparsifier.assert_consistent()


def test_gradients_may_be_accumulated_without_a_sum(processes: Processes) -> None:
    processes.run(accumulate)


def stale_on_one_rank() -> None:
    """Rank 0 alone evaluates weights that it has changed, and puts them back; nobody waits for anybody."""
    import torch.distributed as dist

    model = make_model()
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.8))
    before = sparsifier.threshold.clone()
    if dist.get_rank() == 0:
        with torch.no_grad():
            model[4].weight.mul_(2)
            model(batch(0)[0])
            assert not sparsifier.threshold.equal(before)
            model[4].weight.div_(2)
            model(batch(0)[0])
    assert sparsifier.threshold.equal(before)
    sparsifier.assert_consistent()


def test_an_evaluation_on_one_rank_waits_for_nobody(processes: Processes) -> None:
    processes.run(stale_on_one_rank)
