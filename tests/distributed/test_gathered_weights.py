"""FSDP2 shows layers gathered weights for a while: what reads or selects uses the shards, or says that it cannot."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import feather_kernels as fk
from tests.distributed.processes import Processes


def encoder(shard_first: bool) -> float:
    """The threshold after a step of a layer whose weights are read as attributes."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    if shard_first:
        fully_shard(model)
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5))
    if not shard_first:
        fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.ones(2, 3, 16)).square().sum().backward()
    optimizer.step()
    sparsifier.step()
    whole = torch.cat([weight.parameter.full_tensor().abs().flatten() for weight in sparsifier.weights])
    assert int((whole <= sparsifier.threshold).sum()) == (whole.numel() - 1) // 2 + 1
    return sparsifier.threshold.item()


def test_attention_trains_sharded(processes: Processes) -> None:
    before, after = processes.run(encoder, False), processes.run(encoder, True)
    assert len({*before, *after}) == 1


def step_after_a_forward_that_raised() -> str:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5))
    fully_shard(model, reshard_after_forward=False)
    model(torch.ones(2, 16)).sum().backward()
    sparsifier.step()

    def fail(*_: object) -> None:
        raise ValueError("planted")

    handle = model[2].register_forward_hook(fail)
    with pytest.raises(ValueError, match="planted"):
        model(torch.ones(2, 16))
    handle.remove()
    with pytest.raises(RuntimeError) as raised:
        sparsifier.step()
    return str(raised.value)


def finalize_below_the_root() -> str:
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Linear(16, 16), nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16)))
    sparsifier = fk.Sparsifier(model[1], schedule=fk.ConstantSchedule(0.8))
    fully_shard(model[1][1])
    fully_shard(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    def train() -> None:
        for _ in range(2):
            model(torch.ones(4, 16)).square().sum().backward()
            optimizer.step()
            sparsifier.step()
        with torch.no_grad():
            model.eval()(torch.ones(4, 16))
        sparsifier.finalize()

    with pytest.raises(RuntimeError) as raised:
        train()
    return str(raised.value)


@pytest.mark.parametrize("mistake", [step_after_a_forward_that_raised, finalize_below_the_root])
def test_gathered_weights_are_not_taken_for_the_shards(processes: Processes, mistake: object) -> None:
    for message in processes.run(mistake):  # type: ignore[arg-type]
        assert "is still gathered, and its shards cannot be reached" in message


def initialise_sharded_meta_model() -> tuple[int, float]:
    from torch.distributed.fsdp import fully_shard

    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8))
    fully_shard(model)
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.8))
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    sparsifier.refresh()
    return sparsifier.report().zeros, sparsifier.threshold.item()


def test_a_model_sharded_on_meta_selects_after_to_empty(processes: Processes) -> None:
    found = processes.run(initialise_sharded_meta_model)
    assert len(set(found)) == 1
    assert found[0][0] == (32 * 64 + 64 * 8 - 1) * 8 // 10 + 1
    assert found[0][1] > 0
