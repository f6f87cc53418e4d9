"""Options of single layers: which entry wins, what each option does, and which are refused."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import feather_kernels as fk
from tests.support import nets
from tests.support.oracle import order_statistics, scores


def thresholds(sparsifier: fk.Sparsifier) -> list[Tensor]:
    return [weight.uses[0].binding.value for weight in sparsifier.weights]


def powers(overrides: dict[Any, dict[str, Any]]) -> list[float]:
    sparsifier = fk.Sparsifier(nets.conv_net(), sparsity=0.5, total_steps=4, power=math.inf, overrides=overrides)
    return [weight.uses[0].binding.power for weight in sparsifier.weights]


@pytest.mark.parametrize("order", [1, -1])
def test_name_before_pattern_before_class_before_global(order: int) -> None:
    entries = [
        (nn.Linear, {"power": 1}),
        ("re:[78]", {"power": 2}),
        ("8", {"power": 3}),
        (nn.Conv2d, {"grad_scale": 0.5}),
    ]
    assert powers(dict(entries[::order])) == [math.inf, math.inf, 1, 2, 3]


def test_a_longer_name_wins_and_options_come_each_from_their_own_entry() -> None:
    model = nn.ModuleDict({"body": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "head": nn.Linear(8, 8)})
    overrides = {
        nn.Linear: {"power": 2, "grad_scale": 0.5},
        "body": {"power": 1},
        "body.1": {"power": 4, "sparsity": 0.0},
    }
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5), overrides=overrides)
    uses = [weight.uses[0].binding for weight in sparsifier.weights]
    assert [use.power for use in uses] == [1, 4, 2]
    assert [use.grad_scale.item() for use in uses] == [0.5] * 3
    assert thresholds(sparsifier)[1] == 0


def test_own_sparsity_ramps_with_the_schedule_and_leaves_the_group() -> None:
    model = nets.conv_net()
    weights = nets.prunable(model)
    overrides = {"0": {"sparsity": 0.4}, "8": {"sparsity": 0.0}}
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=10, overrides=overrides)
    group = [scores(w) for w in (weights[1], weights[2], weights[3])]
    model(nets.images())
    for _ in range(8):
        s = sparsifier.sparsity
        own, *rest, last = [layer.zeros for layer in sparsifier.report().layers]
        if s > 0:
            assert own == math.floor(215 * (0.4 * (s / 0.8))) + 1
            rank = math.floor((144 + 2560 + 640 - 1) * s)
            assert sum(rest) == rank + 1
            low, high = order_statistics(group, rank)
            assert low <= thresholds(sparsifier)[1] < high
        assert last == 0
        assert sparsifier.report().ties == 0
        sparsifier.step()
    assert sparsifier.sparsity == 0.8


def test_own_sparsity_is_never_passed_on_the_way() -> None:
    schedule = fk.CubicSchedule(0.4, 0, 10, initial_sparsity=0.8)
    sparsifier = fk.Sparsifier(nets.conv_net(), schedule=schedule, overrides={"0": {"sparsity": 0.9}})
    assert sparsifier.report().layers[0].zeros == math.floor(215 * 0.9) + 1


def test_own_density_and_floor_of_all() -> None:
    model = nets.conv_net()
    overrides = {"0": {"min_density": 0.9}, "3": {"min_density": 0.0}}
    sparsifier = fk.Sparsifier(
        model, schedule=fk.ConstantSchedule(0.8), min_density=0.1, overrides=overrides, score_scale="l2"
    )
    layers = sparsifier.report().layers
    assert 216 - layers[0].zeros == math.ceil(0.9 * 216)
    assert sum(layer.zeros for layer in layers) == math.floor(4199 * 0.8) + 1
    assert all(layer.numel - layer.zeros >= math.ceil(0.1 * layer.numel) for layer in layers[2:])


@pytest.mark.parametrize("capturable", [False, True])
@pytest.mark.parametrize("changing", [False, True])
def test_own_gradient_scale(changing: bool, capturable: bool) -> None:
    model = nets.conv_net()
    scale = (lambda s: 1 - s) if changing else 0.75
    overrides = {"8": {"grad_scale": 0.25}, "0": {"grad_scale": 1}}
    options = {"grad_scale": scale, "overrides": overrides, "capturable": capturable}
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=8, **options)
    model(nets.images())
    for _ in range(6):
        others = 1 - sparsifier.sparsity if changing else 0.75
        uses = [weight.uses[0].binding for weight in sparsifier.weights]
        got = [1.0 if use.grad_scale is None else use.grad_scale.item() for use in uses]
        assert got == pytest.approx([1, others, others, others, 0.25])
        sparsifier.step()


def test_tied_weight_takes_the_override_of_either_name() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 4))
    model[1].weight = model[0].weight
    options = {"overrides": {"1": {"sparsity": 0.0, "grad_scale": 0.5}}, "grad_scale": lambda s: s}
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5), **options)
    uses = [use.binding for weight in sparsifier.weights for use in weight.uses]
    assert [use.grad_scale.item() for use in uses] == [0.5] * 3
    assert [use.value.item() > 0 for use in uses] == [False, False, True]


@pytest.mark.parametrize(
    ("overrides", "error", "message"),
    [
        ({"0": {"spasity": 0.5}}, ValueError, r"overrides\['0'\] must have only the options .*; got spasity"),
        ({"1": {"power": 2}}, ValueError, "overrides must match prunable layers, but '1' matches none"),
        ({nn.Conv3d: {"power": 2}}, ValueError, "overrides must match .*Conv3d.* matches none"),
        ({"re:x.*": {"power": 2}}, ValueError, r"'re:x.\*' matches none"),
        ({"re:(": {"power": 2}}, ValueError, r"overrides must have a regular expression after re:, got 're:\('"),
        ({"0": {"sparsity": 95}}, ValueError, r"sparsity must be in \[0, 1\), got 95 \(a fraction"),
        ({"0": {"min_density": -1}}, ValueError, r"min_density must be in \[0, 1\], got -1"),
        ({"0": {"min_density": "all"}}, TypeError, "min_density must be a number, got 'all'"),
        ({"0": {"power": 0.5}}, ValueError, "power must be at least 1 .*got 0.5"),
        ({"0": {"grad_scale": math.inf}}, ValueError, "grad_scale must be a finite number of at least 0, got inf"),
        ({"0": {"grad_scale": "auto"}}, TypeError, "grad_scale must be a number, got 'auto'"),
        ({"0": 0.5}, TypeError, r"overrides\['0'\] must be a dict of options, got 0.5"),
        ({"0": {"min_density": 0.9, "sparsity": 0.5}}, ValueError, "sparsity 0.0972 can be reached, not 0.5"),
    ],
)
def test_bad_overrides_leave_the_model_dense(overrides: Any, error: type[Exception], message: str) -> None:
    model = nets.conv_net()
    with pytest.raises(error, match=message):
        fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5), overrides=overrides)
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize(
    "schedule", [fk.ConstantSchedule(0.0), fk.LambdaSchedule(lambda step: 0.5)], ids=["zero", "unknown"]
)
def test_own_sparsity_without_a_ramp_is_refused(schedule: Any) -> None:
    with pytest.raises(ValueError, match="overrides: sparsity needs a schedule with a final_sparsity above 0"):
        fk.Sparsifier(nets.conv_net(), schedule=schedule, grad_scale=1.0, overrides={"0": {"sparsity": 0.5}})


def test_own_sparsity_under_a_scope_function_is_refused() -> None:
    with pytest.raises(ValueError, match="scope must be a name if"):
        fk.Sparsifier(
            nets.conv_net(),
            schedule=fk.ConstantSchedule(0.5),
            scope=lambda weights, s: torch.tensor(0.1),
            overrides={"0": {"sparsity": 0.5}},
        )


def test_a_copy_gets_the_scales_of_its_own_layers() -> None:
    model = nets.conv_net()
    options = {"grad_scale": lambda s: 1 - s, "overrides": {"8": {"grad_scale": 0.25}}}
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=8, **options)
    average = copy.deepcopy(model)
    model(nets.images())
    sparsifier.step()
    sparsifier.refresh(average)
    scales = [average[i].feather.thresholds["weight"].grad_scale.item() for i in (0, 3, 6, 7, 8)]
    assert scales == pytest.approx([1 - sparsifier.sparsity] * 4 + [0.25])
