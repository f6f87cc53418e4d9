"""Training that ends short of its final sparsity: finalize() says so, with numbers, before it changes anything."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import feather_kernels as fk
from tests.support import nets


def train(sparsifier: fk.Sparsifier, steps: int) -> None:
    for _ in range(steps):
        sparsifier.step()


def linear(**options: Any) -> fk.Sparsifier:
    torch.manual_seed(0)
    return fk.Sparsifier(nn.Linear(100, 100), **options)


def test_a_schedule_that_has_not_ended_is_warned_about() -> None:
    sparsifier = linear(sparsity=0.95, total_steps=80)  # 80 batches, but accumulation of 8
    train(sparsifier, 10)
    weight = sparsifier.model.weight.clone()
    message = (
        r"counted 10 steps, and its schedule ends at step 40: the model is 54\.92\d\d% sparse, not the final 95\.0000%"
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(fk.SparsityWarning, match=message):
            sparsifier.finalize()
    assert sparsifier.model.weight.equal(weight), "an error leaves everything as it was"
    train(sparsifier, 1)
    with pytest.warns(fk.SparsityWarning, match=r"counted 11 steps, and its schedule ends at step 40") as record:
        sparsifier.finalize()
    assert record[0].filename == __file__
    assert issubclass(fk.SparsityWarning, UserWarning)


@pytest.mark.parametrize(
    ("options", "steps", "message"),
    [
        (
            {"sparsity": 0.9, "total_steps": 4},
            0,
            "counted 0 steps, and its schedule ends at step 2: .* not the final 90",
        ),
        (
            {"schedule": fk.CubicSchedule(0.9, 2, 6)},
            5,
            "counted 5 steps, and its schedule ends at step 6: .* not the final 90",
        ),
        (
            {"schedule": fk.LambdaSchedule(lambda step: step / 10), "total_steps": 8, "grad_scale": 1},
            5,
            "counted 5 steps, .* at step 8: the model is 50.*% sparse, not the final sparsity of its schedule",
        ),
        (
            {"schedule": fk.LambdaSchedule(lambda step: min(step / 10, 0.9), final_sparsity=0.9)},
            5,
            "counted 5 steps: .* not the final 90",
        ),
        (
            {"sparsity": 0.9, "total_steps": 8, "capturable": True},
            1,
            "counted 1 steps, and its schedule ends at step 4",
        ),
    ],
)
def test_every_kind_of_schedule(options: dict[str, Any], steps: int, message: str) -> None:
    sparsifier = linear(**options)
    train(sparsifier, steps)
    with pytest.warns(fk.SparsityWarning, match=message):
        sparsifier.finalize()


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        ({"sparsity": 0.9, "total_steps": 8}, 4),
        ({"sparsity": 0.0, "total_steps": 8}, 0),
        ({"schedule": fk.ConstantSchedule(0.9)}, 0),
        ({"schedule": fk.LambdaSchedule(lambda step: step / 10), "grad_scale": 1}, 5),
        ({"schedule": fk.LambdaSchedule(lambda step: step / 10), "total_steps": 5, "grad_scale": 1}, 5),
        ({"schedule": fk.ConstantSchedule(0.9), "scope": "layer", "min_density": 0.05}, 0),
        ({"schedule": fk.ConstantSchedule(0.9), "scope": "erk", "score_scale": "l2"}, 0),
        ({"schedule": fk.ConstantSchedule(0.9), "overrides": {nn.Linear: {"sparsity": 0.3}}}, 0),
    ],
)
def test_the_goal_reached_is_not_warned_about(options: dict[str, Any], steps: int) -> None:
    sparsifier = linear(**options)
    train(sparsifier, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsifier.finalize()


def test_a_resumed_training_counts_all_its_steps() -> None:
    first, second = (linear(sparsity=0.9, total_steps=8) for _ in range(2))
    train(first, 2)
    second.load_state_dict(first.state_dict())
    train(second, 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second.finalize()


def test_thresholds_of_a_function_that_prune_too_little_are_warned_about() -> None:
    sparsifier = linear(
        schedule=fk.ConstantSchedule(0.9), scope=lambda weights, sparsity: torch.tensor(0.01, dtype=torch.float32)
    )
    zeros = sparsifier.report().zeros
    with pytest.warns(fk.SparsityWarning, match=rf"has {zeros} zeros where .* asks for 9000"):
        sparsifier.finalize()


def test_weights_that_are_not_numbers_are_warned_about() -> None:
    sparsifier = linear(schedule=fk.ConstantSchedule(0.9))
    with torch.no_grad():
        sparsifier.model.weight[:50] = float("nan")
    with pytest.warns(fk.SparsityWarning, match=r"zeros where .* asks for 9000"):
        sparsifier.finalize()


def test_empty_layers_are_warned_about_with_the_remedy() -> None:
    def sparsify(**options: Any) -> fk.Sparsifier:
        model = nets.conv_net()
        with torch.no_grad():
            model[6].weight.mul_(1e-3)
            model[8].weight.mul_(1e-3)
        return fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.9), **options)

    sparsifier = sparsify()
    with pytest.warns(
        fk.SparsityWarning, match=r"these layers have no weight left \(2 of 5\): 6, 8\. min_density=0\.01"
    ):
        sparsifier.finalize()
    assert [layer.name for layer in sparsifier.report().empty_layers] == ["6", "8"]
    sparsifier = sparsify(min_density=0.01)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sparsifier.finalize()


# ------------------------------------------------------------------------------------------------ frozen, thawed


def test_frozen_weights_that_are_thawed_are_warned_about_once() -> None:
    model = nets.conv_net()
    model[8].requires_grad_(False)
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5))
    assert [layer.reason for layer in sparsifier.skipped] == [
        "frozen (requires_grad=False): pruned only if targets names it"
    ]
    sparsifier.step()
    model[8].requires_grad_(True)
    for twin in (copy.deepcopy(sparsifier), sparsifier):
        with pytest.warns(fk.SparsityWarning, match=r"frozen .* require a gradient now: 8\. .*targets"):
            twin.step()
        twin.step()


def test_weights_that_are_frozen_while_others_train_stay_sparse() -> None:
    """As in the two halves of a GAN's step."""
    model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5))
    for training in (True, False, True):
        model.requires_grad_(training)
        y = model(nets.images())
        if training:
            y.sum().backward()
        sparsifier.step()
    assert all(int((layer.sparse_weight() == 0).sum()) for layer in (model[0], model[3], model[6], model[7], model[8]))
    assert sparsifier.report().sparsity >= 0.5


@pytest.mark.parametrize("asked", [False, True])
def test_weights_that_are_frozen_after_the_model_was_made_sparse_are_warned_about(asked: bool) -> None:
    model = nets.conv_net()
    if asked:
        model[8].requires_grad_(False)
    options = {"targets": ["re:.*", "8"]} if asked else {}
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5), **options)
    model[8].requires_grad_(False)
    model(nets.images()).sum().backward()
    if asked:
        sparsifier.step()
    else:
        with pytest.warns(
            fk.SparsityWarning, match=r"are pruned, though they do not train: 8\. .* freeze them before .* ignore"
        ):
            sparsifier.step()
    sparsifier.step()


# ------------------------------------------------------------------------------------------------ looking


def test_repr_says_what_is_sparse_and_how_far_it_is() -> None:
    sparsifier = linear(sparsity=0.9, total_steps=8)
    train(sparsifier, 2)
    text = repr(sparsifier)
    for part in ("Linear: 1 weights with 10,000 elements", "CubicSchedule", "step 2", "sparsity 0.7875 of 0.9"):
        assert part in text
    sparsifier.detach()
    assert "ended by detach()" in repr(sparsifier)
