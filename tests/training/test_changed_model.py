"""Layers or weights replaced after sparsifying are followed, or an error names the layer."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing

import feather_kernels as fk
from tests.support import nets


def constant(model: nn.Module, sparsity: float = 0.9, **options: Any) -> fk.Sparsifier:
    return fk.Sparsifier(model, schedule=fk.ConstantSchedule(sparsity), **options)


def two_layers() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10))


def train(model: nn.Module, width: int = 32) -> None:
    model(torch.ones(2, width)).sum().backward()


# ------------------------------------------------------------------------------------------------ layers


def replace_head(model: nn.Module) -> None:
    model[2] = nn.Linear(64, 20)


def remove_head(model: nn.Module) -> None:
    model[2] = nn.Identity()


def delete_head(model: nn.Module) -> None:
    del model[2]


def replace_block(model: nn.Module) -> None:
    model[2] = nn.Sequential(nn.Linear(64, 8), nn.Linear(8, 10))


@pytest.mark.parametrize("change", [replace_head, remove_head, delete_head, replace_block])
@pytest.mark.parametrize("look", ["step", "report", "finalize", "state_dict", "forward"])
def test_a_layer_that_has_left_the_model_is_named(change: Callable[[nn.Module], None], look: str) -> None:
    model = two_layers()
    sparsifier = constant(model)
    train(model)
    sparsifier.step()
    step, weight = sparsifier.step_count, model[0].latent().clone()
    change(model)
    with pytest.raises(RuntimeError, match=r"no longer part of the model.*: 2 \(Linear\).*finalize\(\) a copy first"):
        train(model) if look == "forward" else getattr(sparsifier, look)()
    assert sparsifier.step_count == step
    assert model[0].latent().equal(weight)
    sparsifier.detach()
    assert type(model[0]) is nn.Linear
    with pytest.raises(RuntimeError, match="report is not available after detach"):
        sparsifier.report()


def test_a_fused_copy_is_an_error_in_its_next_forward() -> None:
    model = two_layers()
    constant(model)
    average = copy.deepcopy(model)
    train(average)
    average[2] = nn.Linear(64, 10)
    with pytest.raises(RuntimeError, match=r"no longer part of the model.*: 2 \(Linear\)"):
        train(average)
    train(model)


def test_layers_that_move_are_followed() -> None:
    model = two_layers()
    sparsifier = constant(model)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, nn.Linear))
    assert type(model[2]).__name__ == "CheckpointWrapper"
    train(model)
    sparsifier.step()
    model[2] = nn.Sequential(model[2], nn.Identity())
    train(model)
    sparsifier.step()
    assert [layer.name for layer in sparsifier.report().layers] == ["0", "2"]
    assert sparsifier.report().zeros == math.floor((32 * 64 + 640 - 1) * 0.9) + 1


def test_layers_that_come_later_are_reported_and_warned_about() -> None:
    model = two_layers()
    sparsifier = constant(model)
    model.append(nn.Linear(10, 5))
    (added,) = sparsifier.report().skipped
    assert (added.name, added.reason) == ("3", "added after the model was made sparse")
    with pytest.warns(fk.SparsityWarning, match="added after the model was made sparse stay dense: 3"):
        sparsifier.finalize()
    assert int((model[3].weight == 0).sum()) == 0


# ------------------------------------------------------------------------------------------------ Parameters


@pytest.mark.parametrize("form", ["call", "read"])
def test_a_replaced_parameter_of_the_same_shape_is_followed(form: str) -> None:
    model = two_layers()
    sparsifier = constant(model, read_directly=["2"] if form == "read" else None)
    train(model)
    sparsifier.step()
    model[2].weight = nn.Parameter(5 * torch.randn(10, 64))
    train(model)
    sparsifier.step()
    wanted = fk.functional.magnitude_threshold([model[0].latent(), model[2].latent()], 0.9)
    assert sparsifier.threshold.equal(wanted)
    sparsifier.finalize()
    assert int((model[0].weight == 0).sum() + (model[2].weight == 0).sum()) == math.floor((2048 + 640 - 1) * 0.9) + 1


@pytest.mark.parametrize("look", ["step", "finalize"])
def test_a_parameter_of_another_shape_is_named(look: str) -> None:
    model = two_layers()
    sparsifier = constant(model)
    model[2].weight, model[2].bias = nn.Parameter(torch.randn(20, 64)), nn.Parameter(torch.zeros(20))
    with pytest.raises(RuntimeError, match=r"the weight of 2 had shape \(10, 64\) .* now \(20, 64\)"):
        getattr(sparsifier, look)()


@pytest.mark.parametrize("kept", [0.5, 0.0], ids=["FSDP1", "ZeRO-3"])
def test_flat_shards_are_an_error(kept: float) -> None:
    model = two_layers()
    sparsifier = constant(model)
    train(model)
    before = sparsifier.threshold.clone()
    for parameter in model.parameters():
        parameter.grad = None
        if parameter.dim() == 2:
            parameter.data = parameter.data.flatten()[: int(kept * parameter.numel())].clone()
    with pytest.raises(RuntimeError, match=r"weight of 0 has shape \(\d+,\), a flat shard.*DistributedData"):
        sparsifier.step()
    assert sparsifier.threshold.equal(before)
    with pytest.raises(RuntimeError, match="a flat shard"):
        constant(two_layers_of_shards())


def two_layers_of_shards() -> nn.Module:
    model = two_layers()
    for parameter in model.parameters():
        parameter.data = parameter.data.flatten()
    return model


def test_structure_survives_copies_and_pickles() -> None:
    model = nets.conv_net()
    sparsifier = constant(model)
    for duplicate in (copy.deepcopy, nets.through_pickle):
        twin, other = duplicate((model, sparsifier))
        twin(nets.images())
        other.step()
        twin[8] = nn.Linear(64, 10)
        with pytest.raises(RuntimeError, match=r"no longer part of the model.*: 8 \(Linear\)"):
            other.step()
    model(nets.images())
    sparsifier.step()


def test_a_step_that_fails_does_not_count_and_detach_is_the_way_out() -> None:
    model = two_layers()
    sparsifier = constant(model)
    sparsifier.step()
    model[2].weight = nn.Parameter(torch.randn(20, 64))
    for _ in range(3):
        with pytest.raises(RuntimeError, match="had shape"):
            sparsifier.step()
    assert sparsifier.step_count == 1
    sparsifier.detach()
    assert type(model[0]) is type(model[2]) is nn.Linear


def test_detach_keeps_the_report_of_a_model_whose_layers_have_moved() -> None:
    model = two_layers()
    sparsifier = constant(model)
    model[2] = nn.Sequential(model[2])
    sparsifier.detach()
    assert [layer.name for layer in sparsifier.report().layers] == ["0", "2"]


@pytest.mark.parametrize(
    "options", [{"targets": ["0", "2"]}, {"min_numel": 60}, {"filter_fn": lambda m, _: m.bias.numel() > 9}]
)
def test_later_layers_that_the_user_would_leave_dense_are_not_warned_about(options: Any) -> None:
    model = two_layers()
    sparsifier = constant(model, **options)
    model.append(nn.Linear(10, 5))
    sparsifier.finalize()
