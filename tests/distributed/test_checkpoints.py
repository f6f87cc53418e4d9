"""torch.distributed.checkpoint: saved by some number of processes, loaded by another."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

import feather_kernels as fk
from tests.distributed.models import gathered, make_model, optimizer_of, own_batch, shard, train_step
from tests.distributed.processes import Processes

SAVED, TOTAL = 5, 20


def build(sharded: bool) -> tuple[Any, fk.Sparsifier, torch.optim.Optimizer]:
    model = make_model()
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=TOTAL, grad_scale=lambda s: 1 - s)
    if sharded:
        shard(model)
        return model, sparsifier, optimizer_of(model)
    return DistributedDataParallel(model), sparsifier, optimizer_of(model)


def state_of(model: Any, sparsifier: fk.Sparsifier, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    from torch.distributed.checkpoint.state_dict import get_state_dict

    weights, momenta = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": momenta, "sparsifier": sparsifier}


def save(folder: str, sharded: bool) -> tuple[Tensor, list[Tensor]]:
    import torch.distributed.checkpoint as dcp

    model, sparsifier, optimizer = build(sharded)
    for step in range(SAVED):
        train_step(model, optimizer, own_batch(step))
        sparsifier.step()
    dcp.save(state_of(model, sparsifier, optimizer), checkpoint_id=folder)
    return sparsifier.state_dict()["thresholds"], gathered(model)


def load(folder: str, sharded: bool) -> tuple[Tensor, list[Tensor], int, Tensor, Tensor]:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.state_dict import set_state_dict

    model, sparsifier, optimizer = build(sharded)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state = state_of(model, sparsifier, optimizer)
    dcp.load(state, checkpoint_id=folder)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    loaded = sparsifier.state_dict()["thresholds"].clone()
    model(own_batch(SAVED)[0])  # keeps what was loaded
    assert sparsifier.state_dict()["thresholds"].equal(loaded)
    weights, step = gathered(model), sparsifier.step_count
    sparsifier.assert_consistent()
    train_step(model, optimizer, own_batch(SAVED))
    sparsifier.step()
    scales = sparsifier.state_dict()["grad_scales"]
    return loaded, weights, step, sparsifier.threshold.clone(), scales


def go_on(folder: str, sharded: bool) -> Tensor:
    """The step after the one that was saved, in the processes that saved."""
    model, sparsifier, optimizer = build(sharded)
    for step in range(SAVED + 1):
        train_step(model, optimizer, own_batch(step))
        sparsifier.step()
    return sparsifier.threshold.clone()


@pytest.mark.parametrize(
    ("saved_by", "loaded_by", "sharded"),
    [(4, 2, True), (2, 4, True), (2, 1, True), (2, 2, False)],
    ids=["4 to 2", "2 to 4", "2 to 1", "replicated"],
)
def test_a_checkpoint_loads_on_another_number_of_processes(
    processes: Processes, tmp_path: Path, saved_by: int, loaded_by: int, sharded: bool
) -> None:
    folder = str(tmp_path / "checkpoint")
    thresholds, weights = processes.run(save, folder, sharded, world=saved_by)[0]
    ranks = processes.run(load, folder, sharded, world=loaded_by)
    for loaded, loaded_weights, step, following, scales in ranks:
        assert step == SAVED
        assert loaded.equal(thresholds)
        assert all(a.equal(b) for a, b in zip(loaded_weights, weights, strict=True))
        assert following.equal(ranks[0][3])
        assert (scales < 1).all()


def test_a_run_goes_on_bit_for_bit(processes: Processes, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    processes.run(save, folder, True)
    resumed = processes.run(load, folder, True)
    assert resumed[0][3].equal(processes.run(go_on, folder, True)[0])
