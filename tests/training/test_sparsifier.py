"""The sparsifier: schedule, exact sparsity, reports, state, the end of training, and every error."""

from __future__ import annotations

import copy
import csv
import gc
import io
import json
import math
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import feather_kernels as fk
from feather_kernels.ops.call_record import CallRecord
from tests.support import nets
from tests.support.no_host_read import NoHostRead


def train(
    model: nn.Module, sparsifier: fk.Sparsifier, steps: int, optimizer: torch.optim.Optimizer | None = None
) -> None:
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = nets.images(), torch.arange(8)
    for _ in range(steps):
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()


def zeros_in(model: nn.Module) -> int:
    return sum(int((w == 0).sum()) for w in nets.prunable(model))


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9, 0.95, 0.99, 0.999])
def test_finalize_gives_the_requested_sparsity(sparsity: float) -> None:
    model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, sparsity=sparsity, total_steps=12)
    train(model, sparsifier, 12)
    model.eval()
    before, report = model(nets.images()), sparsifier.report()
    assert sparsifier.finalize() is model
    assert model(nets.images()).equal(before)
    count = sum(w.numel() for w in nets.prunable(model))
    expected = math.floor((count - 1) * sparsity) + 1 + report.ties if sparsity else 0
    assert zeros_in(model) == expected == report.zeros
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_ties_are_counted(dtype: torch.dtype) -> None:
    model = nets.conv_net().to(dtype)
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.9))
    report = sparsifier.report()
    count = sum(w.numel() for w in nets.prunable(model))
    sparsifier.finalize()
    assert zeros_in(model) == math.floor((count - 1) * 0.9) + 1 + report.ties
    if dtype == torch.bfloat16:
        assert report.ties > 0, "a bf16 net has many weights of one magnitude"
        assert report.ties == sum(layer.ties for layer in report.layers)


def test_zero_weights_tie_at_a_zero_threshold() -> None:
    layer = nn.Linear(10, 10)
    with torch.no_grad():
        layer.weight.zero_()
        layer.weight[0] = 1.0
    sparsifier = fk.Sparsifier(layer, schedule=fk.ConstantSchedule(0.5))
    report = sparsifier.report()
    assert sparsifier.threshold.item() == 0
    assert (report.zeros, report.ties) == (90, 90 - 50)


def test_threshold_follows_the_schedule_and_step_zero_is_set() -> None:
    model = nets.conv_net()
    schedule = fk.CubicSchedule(0.9, begin_step=2, end_step=6, initial_sparsity=0.2)
    sparsifier = fk.Sparsifier(model, schedule=schedule)
    seen = []
    for step in range(10):
        assert sparsifier.step_count == step
        expected = fk.functional.magnitude_threshold(nets.prunable(model), schedule.sparsity_at(step))
        assert sparsifier.threshold.equal(expected)
        seen.append(sparsifier.sparsity)
        train(model, sparsifier, 1)
    assert seen[:3] == [0.0, 0.0, 0.2]
    assert seen[6:] == [0.9] * 4
    assert fk.Sparsifier(nets.conv_net(), schedule=fk.ConstantSchedule(0.5)).threshold.item() > 0


def test_default_schedule_ends_at_half_time_and_stays() -> None:
    sparsifier = fk.Sparsifier(nets.conv_net(), sparsity=0.8, total_steps=21)
    assert sparsifier.schedule == fk.CubicSchedule(0.8, 0, 10)
    assert sparsifier.schedule.sparsity_at(10) == 0.8
    assert sparsifier.schedule.sparsity_at(10**9) == 0.8
    assert fk.CubicSchedule(0.8, 0, 10).sparsity_at(5) == pytest.approx(0.8 * (1 - 0.5**3))


def test_a_step_reads_nothing_on_the_host() -> None:
    model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, sparsity=0.9, total_steps=4)
    model(nets.images())
    with fk.use_backend("reference"), NoHostRead() as mode:  # the C++ backend reads memory, not through torch
        for _ in range(6):
            sparsifier.step()
    assert "index_add_" in mode.ops


@pytest.mark.parametrize(("sparsity", "scale"), [(0.9, None), (0.95, None), (0.951, 0.5)])
def test_grad_scale_auto(sparsity: float, scale: float | None) -> None:
    model = nets.conv_net()
    fk.Sparsifier(model, sparsity=sparsity, total_steps=10)
    actual = model[0].feather.thresholds["weight"].grad_scale
    assert (None if actual is None else actual.item()) == scale


def test_tied_weights_count_once_and_the_root_may_be_the_layer() -> None:
    model = nn.Sequential(nn.Linear(6, 6, bias=False), nn.ReLU(), nn.Linear(6, 6, bias=False), nn.Linear(6, 2))
    model[2].weight = model[0].weight
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5))
    report = sparsifier.report()
    assert [layer.name for layer in report.layers] == ["0 = 2", "3"]
    assert report.numel == 36 + 12 == report.model_parameters - 2
    sparsifier.finalize()
    assert model[2].weight is model[0].weight
    assert zeros_in(model) == math.floor(47 * 0.5) + 1

    root = nn.Linear(30, 20)
    report = fk.Sparsifier(root, schedule=fk.ConstantSchedule(0.5)).report()
    assert [layer.name for layer in report.layers] == ["(root)"]
    assert type(root) is fk.nn.FeatherLinear


def test_shared_module_counts_once() -> None:
    layer = nn.Linear(5, 5)
    model = nn.Sequential(layer, nn.ReLU(), layer)
    assert [w.name for w in fk.Sparsifier(model, sparsity=0.5, total_steps=4).weights] == ["0"]


class LanguageModel(nn.Module):
    """Attention, recurrence, norms, and an output layer tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 8)
        self.position = nn.Parameter(torch.randn(5, 8))
        self.encoder = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.recurrent = nn.GRU(8, 8, bidirectional=True)
        self.bilinear = nn.Bilinear(8, 8, 8)
        self.norm = nn.LayerNorm((2, 4))
        self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
        self.head = nn.Linear(8, 20, bias=False)
        self.head.weight = self.embedding.weight


def test_layers_left_dense_have_a_reason() -> None:
    model = LanguageModel()
    sparsifier = fk.Sparsifier(model, sparsity=0.5, total_steps=4)
    directions = [f"recurrent.weight_{kind}_l0{end}" for end in ("", "_reverse") for kind in ("ih", "hh")]
    assert [w.name for w in sparsifier.weights] == [
        "encoder.self_attn.in_proj_weight",
        "encoder.self_attn.out_proj",
        "encoder.linear1",
        "encoder.linear2",
        *directions,
    ]
    assert {layer.name: layer.reason for layer in sparsifier.report().skipped} == {
        "(root)": "LanguageModel: pruned only if targets names it",
        "bilinear": 'Bilinear: pruned only if targets names it; targets=["re:.*", "bilinear"] prunes it and the '
        "default layers",
        "normed": "ParametrizedLinear: one of its parameters has a parametrization",
        "head": "its weight is tied to 'embedding' (Embedding), which stays dense",
    }
    assert type(model.head) is nn.Linear


def test_layers_of_any_kind_are_taken_where_named() -> None:
    model = LanguageModel()
    targets = ["embedding", "head", nn.Bilinear, "re:encoder.linear1"]
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5), targets=targets)
    assert [w.name for w in sparsifier.weights] == ["embedding = head", "encoder.linear1", "bilinear"]
    x = torch.randint(20, (3,))
    assert int((model.embedding(x) == 0).sum()) > 0
    sparsifier.finalize()
    assert model.head.weight is model.embedding.weight
    assert type(model.embedding) is nn.Embedding


def test_weight_tied_to_an_ignored_layer_stays_dense() -> None:
    model = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2))
    model[1].weight = model[0].weight
    sparsifier = fk.Sparsifier(model, sparsity=0.5, total_steps=4, ignore=["1"])
    assert [w.name for w in sparsifier.weights] == ["2"]
    assert {s.name: s.reason for s in sparsifier.skipped} == {
        "0": "its weight is tied to '1' (Linear), which stays dense",
        "1": "in ignore",
    }


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"targets": ["0", "6"]}, ["0", "6"]),
        ({"targets": [nn.Conv2d]}, ["0", "3"]),
        ({"targets": ["re:[0-5]"]}, ["0", "3"]),
        ({"ignore": ["8", nn.Conv2d]}, ["6", "7"]),
        ({"targets": [nn.Linear], "ignore": ["7"]}, ["6", "8"]),
        ({"filter_fn": lambda module, name: getattr(module, "groups", 1) == 1}, ["0", "6", "7", "8"]),
        ({"min_numel": 640}, ["6", "7", "8"]),
        ({"min_numel": 641}, ["6"]),
    ],
)
def test_choice_of_layers(arguments: dict[str, Any], names: list[str]) -> None:
    sparsifier = fk.Sparsifier(nets.conv_net(), sparsity=0.5, total_steps=4, **arguments)
    assert [w.name for w in sparsifier.weights] == names
    assert len(sparsifier.skipped) == 5 - len(names)


def test_target_names_a_container() -> None:
    model = nn.ModuleDict({"head": nets.conv_net(), "header": nn.Linear(2, 2)})
    sparsifier = fk.Sparsifier(model, sparsity=0.5, total_steps=4, targets=["head"])
    assert [w.name for w in sparsifier.weights] == ["head.0", "head.3", "head.6", "head.7", "head.8"]


def test_no_calls_are_recorded_after_the_first_step_or_without_a_sparsifier() -> None:
    gc.collect()
    active = len(CallRecord.active)
    model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, sparsity=0.5, total_steps=4)
    assert len(CallRecord.active) == active + 1
    train(model, sparsifier, 1)
    assert len(CallRecord.active) == active
    forgotten = fk.Sparsifier(nets.conv_net(), sparsity=0.5, total_steps=4)
    del forgotten
    gc.collect()
    assert len(CallRecord.active) == active


def test_report_forms_agree() -> None:
    model = nn.ModuleDict({"hidden": nn.Linear(8, 8), "table": nn.Bilinear(2, 2, 2)})
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.25))
    report = sparsifier.report()
    assert report.zeros == math.floor(63 * 0.25) + 1 == 16
    assert report.sparsity == 16 / 64
    assert report.model_sparsity == 16 / sum(p.numel() for p in model.parameters())
    (row,) = csv.DictReader(io.StringIO(report.to_csv()))
    assert row == {
        "layer": "hidden",
        "shape": "8x8",
        "numel": "64",
        "zeros": "16",
        "sparsity": "0.25",
        "threshold": repr(sparsifier.threshold.item()),
        "ties": "0",
        "backward": "keeps",
        "note": "",
    }
    data = report.to_dict()
    assert data["zeros"] == data["layers"][0]["zeros"] == 16
    assert data["target_sparsity"] == 0.25
    reason = 'pruned only if targets names it; targets=["re:.*", "table"] prunes it and the default layers'
    reason = f"Bilinear: {reason}"
    size = {"numel": 8, "shared": 0, "model_share": 8 / report.model_parameters}
    assert data["skipped"] == [{"name": "table", "reason": reason, **size}]
    assert data == json.loads(json.dumps(data))
    for text in (str(report), report.to_markdown()):
        for part in ("hidden", "8x8", "25.0000%", "16 of 64 prunable", reason):
            assert part in text
    table = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {10}


def test_report_before_anything_is_pruned() -> None:
    report = fk.Sparsifier(nets.conv_net(), sparsity=0.5, total_steps=4).report()
    assert (report.zeros, report.ties, report.target_sparsity) == (0, 0, 0.0)


def test_rethreshold_gives_an_average_the_requested_sparsity() -> None:
    model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, sparsity=0.9, total_steps=20)
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(20):
        train(model, sparsifier, 1, optimizer)
        average.update_parameters(model)
    before = sparsifier.threshold.clone()
    sparsifier.refresh(average.module)
    assert sparsifier.threshold.equal(before), "the model's own threshold is left alone"
    weights = nets.prunable(average.module)
    count = sum(w.numel() for w in weights)
    t = average.module[0].feather.thresholds["weight"].value
    assert not t.equal(before)
    assert int(torch.ops.feather_kernels.count_pruned(weights, [t] * len(weights)).sum()) == (
        math.floor((count - 1) * 0.9) + 1
    )
    with pytest.raises(ValueError, match="one deep copy of the whole sparse model"):
        sparsifier.refresh(nets.conv_net())


def test_state_resumes_bit_for_bit(tmp_path: Any) -> None:
    def start() -> tuple[nn.Module, fk.Sparsifier, torch.optim.Optimizer]:
        model = nets.conv_net()
        sparsifier = fk.Sparsifier(model, sparsity=0.9, total_steps=20)
        return model, sparsifier, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    model, sparsifier, optimizer = start()
    train(model, sparsifier, 7, optimizer)
    parts = {"model": model, "sparsifier": sparsifier, "optimizer": optimizer}
    torch.save({name: part.state_dict() for name, part in parts.items()}, tmp_path / "checkpoint.pt")
    train(model, sparsifier, 13, optimizer)

    resumed, resumed_sparsifier, resumed_optimizer = start()
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(state["model"])
    resumed_sparsifier.load_state_dict(state["sparsifier"])
    resumed_optimizer.load_state_dict(state["optimizer"])
    train(resumed, resumed_sparsifier, 13, resumed_optimizer)
    assert resumed_sparsifier.step_count == 20
    assert resumed_sparsifier.threshold.equal(sparsifier.threshold)
    assert all(a.equal(b) for a, b in zip(model.parameters(), resumed.parameters(), strict=True))


def test_state_of_another_model_is_refused() -> None:
    sparsifier = fk.Sparsifier(nets.conv_net(), sparsity=0.9, total_steps=20)
    other = fk.Sparsifier(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(3, 3)), sparsity=0.9, total_steps=20)
    before = sparsifier.state_dict()
    with pytest.raises(ValueError, match=r"expected 3 \[4, 4, 3, 3\], got 1 \[3, 3\]"):
        sparsifier.load_state_dict(other.state_dict())
    shorter = fk.Sparsifier(nets.conv_net(), sparsity=0.9, total_steps=20, targets=["0", "3"])
    with pytest.raises(ValueError, match=r"expected 6 \[10, 256\], got nothing"):
        sparsifier.load_state_dict(shorter.state_dict())
    with pytest.raises(ValueError, match=r"lacks .*'thresholds'"):
        sparsifier.load_state_dict({"step": 3})
    assert str(sparsifier.state_dict()) == str(before)


def test_another_schedule_is_warned_about() -> None:
    state = fk.Sparsifier(nets.conv_net(), sparsity=0.9, total_steps=20).state_dict()
    sparsifier = fk.Sparsifier(nets.conv_net(), sparsity=0.9, total_steps=30)
    message = r"saved at step 0 under .*end_step=10.*end_step=15.*at sparsity 0\.0000.*total_steps"
    with pytest.warns(fk.SparsityWarning, match=message) as warned:
        sparsifier.load_state_dict(state)
    assert warned[0].filename == __file__


def test_schedule_that_cannot_arrive_is_warned_about() -> None:
    schedule = fk.CubicSchedule(0.9, 0, 100)
    with pytest.warns(fk.SparsityWarning, match=r"reaches sparsity 0\.7875 in total_steps=50, not the final 0\.9000"):
        fk.Sparsifier(nets.conv_net(), schedule=schedule, total_steps=50)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fk.Sparsifier(nets.conv_net(), schedule=schedule, total_steps=100)


def test_nothing_works_after_finalize_but_the_report() -> None:
    model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, sparsity=0.5, total_steps=2)
    train(model, sparsifier, 2)
    sparsifier.finalize()
    assert sparsifier.report().zeros == zeros_in(model)
    for call in (
        sparsifier.step,
        sparsifier.finalize,
        lambda: sparsifier.threshold,
        lambda: sparsifier.refresh(model),
        sparsifier.state_dict,
        lambda: sparsifier.load_state_dict({}),
    ):
        with pytest.raises(RuntimeError, match=r"after finalize\(\)"):
            call()
    again = fk.Sparsifier(model, sparsity=0.7, total_steps=2)
    train(model, again, 2)
    assert again.report().zeros == math.floor((again.report().numel - 1) * 0.7) + 1


def test_nan_weights_stay_visible() -> None:
    model = nets.conv_net()
    with torch.no_grad():
        model[0].weight[0, 0, 0, 0] = math.nan
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5))
    assert model(nets.images()).isnan().any()
    sparsifier.finalize()
    assert model[0].weight[0, 0, 0, 0].isnan()


class Lazy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lazy = nn.LazyLinear(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 95, "total_steps": 10}, r"^sparsity must be in \[0, 1\), got 95 \(a fraction .*age: 0\.95\)"),
        ({"sparsity": 1.0, "total_steps": 10}, r"sparsity must be in \[0, 1\), got 1.0"),
        ({"sparsity": -0.1, "total_steps": 10}, r"sparsity must be in \[0, 1\), got -0.1"),
        ({"sparsity": math.nan, "total_steps": 10}, r"sparsity must be in \[0, 1\), got nan"),
        ({"sparsity": 0.5, "total_steps": 0}, "total_steps must be positive, got 0"),
        ({"sparsity": 0.5, "total_steps": -3}, "total_steps must be positive, got -3"),
        ({"sparsity": 0.5}, "give sparsity and total_steps, or give schedule; got sparsity=0.5, total_steps=None"),
        ({}, "give sparsity and total_steps, or give schedule"),
        (
            {"sparsity": 0.5, "schedule": fk.ConstantSchedule(0.5)},
            r"give sparsity or schedule, not both; got",
        ),
        ({"sparsity": 0.5, "total_steps": 9, "power": 0.5}, "power must be at least 1 .*got 0.5"),
        ({"sparsity": 0.5, "total_steps": 9, "grad_scale": -1}, "grad_scale must be .*at least 0, got -1"),
        ({"sparsity": 0.5, "total_steps": 9, "grad_scale": "half"}, "grad_scale must be .*'half'"),
        ({"schedule": fk.LambdaSchedule(lambda t: 0.5)}, '"auto" needs a schedule with a final_sparsity'),
        ({"schedule": fk.LambdaSchedule(lambda t: 5, 0.5)}, r"sparsity at step 0 must be in \[0, 1\), got 5"),
        ({"sparsity": 0.5, "total_steps": 9, "targets": ["layr1"]}, "targets must match .*'layr1' matches none"),
        ({"sparsity": 0.5, "total_steps": 9, "ignore": ["re:x.*"]}, "ignore must match .*'re:x.\\*' matches none"),
        ({"sparsity": 0.5, "total_steps": 9, "min_numel": -1}, "min_numel must be at least 0, got -1"),
        ({"sparsity": 0.5, "total_steps": 9, "min_numel": 10**6}, "must have a prunable layer, got none; 0: 216 el"),
    ],
)
def test_bad_arguments_leave_the_model_dense(arguments: dict[str, Any], message: str) -> None:
    model = nets.conv_net()
    with pytest.raises(ValueError, match=message):
        fk.Sparsifier(model, **arguments)
    assert type(model[0]) is nn.Conv2d


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: nn.BatchNorm2d(3),
            "model must have a prunable layer, got none; linear, convolution, attention and recurrent",
        ),
        (lambda: nn.Linear(0, 5), "model must have a prunable layer, got none"),
        (Lazy, "layer 'lazy' .LazyLinear. is not initialised"),
        (
            lambda: nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3).double()),
            "all prunable weights must be float64 or none",
        ),
    ],
)
def test_models_that_cannot_be_sparsified(make: Any, message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        fk.Sparsifier(make(), schedule=fk.ConstantSchedule(0.5))


def test_model_that_is_sparse_already() -> None:
    model = nets.conv_net()
    fk.Sparsifier(model, sparsity=0.5, total_steps=4)
    with pytest.raises(ValueError, match="layer '0' is sparse already"):
        fk.Sparsifier(model, sparsity=0.5, total_steps=4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: fk.CubicSchedule(0.9, 10, 5), r"end_step must not be before begin_step \(10\), got 5"),
        (lambda: fk.CubicSchedule(0.9, -1, 5), "begin_step must be at least 0, got -1"),
        (lambda: fk.CubicSchedule(90, 0, 5), r"final_sparsity must be in \[0, 1\), got 90 \(a fraction"),
        (lambda: fk.CubicSchedule(0.9, 0, 5, initial_sparsity=-0.1), "initial_sparsity must be"),
        (lambda: fk.CubicSchedule(0.9, 0, 5, power=0), "power must be positive, got 0"),
        (lambda: fk.ConstantSchedule(1.5), "final_sparsity must be"),
        (lambda: fk.LambdaSchedule(lambda t: 0.0, 2.0), "final_sparsity must be"),
    ],
)
def test_bad_schedules(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_copy_keeps_its_threshold_while_training_goes_on() -> None:
    model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, sparsity=0.5, total_steps=4)
    train(model, sparsifier, 2)
    twin = copy.deepcopy(model)
    before = twin[0].feather.thresholds["weight"].value.clone()
    train(model, sparsifier, 2)
    assert twin[0].feather.thresholds["weight"].value.equal(before)
