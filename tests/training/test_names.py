"""Layer names leave out what wrappers add, in reports, states and options; objects that are no model are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import feather_kernels as fk


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2)}), nn.Linear(8, 4))


class ShardingWrapper(nn.Module):
    """Holds what it wraps as FullyShardedDataParallel does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._fsdp_wrapped_module = module


def checkpointed_inside(model: nn.Module) -> nn.Module:
    model[0] = checkpoint_wrapper(model[0])
    model[2] = ShardingWrapper(checkpoint_wrapper(model[2]))
    return model


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "torch.compile": lambda model: torch.compile(model, backend="eager"),
    "DataParallel": nn.DataParallel,
    "AveragedModel": torch.optim.swa_utils.AveragedModel,
    "FullyShardedDataParallel": ShardingWrapper,
    "checkpoint_wrapper": checkpointed_inside,
    "several": lambda model: torch.compile(nn.DataParallel(checkpointed_inside(model)), backend="eager"),
}
NAMES = ["0", "1.attention.in_proj_weight", "1.attention.out_proj", "2"]
each_wrapper = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


def sparsify(model: nn.Module, **options: Any) -> fk.Sparsifier:
    return fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5), **options)


def names(sparsifier: fk.Sparsifier) -> list[str]:
    return [layer.name for layer in sparsifier.report().layers]


@each_wrapper
def test_names_in_reports_lack_what_a_wrapper_adds(wrap: Callable[[nn.Module], nn.Module]) -> None:
    assert names(sparsify(wrap(make_model()))) == NAMES
    left = sparsify(wrap(make_model()), ignore=["1", "2"]).skipped
    assert [layer.name for layer in left] == ["1.attention", "1.attention.out_proj", "2"]


@each_wrapper
def test_options_match_a_name_with_and_without_what_a_wrapper_adds(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(make_model())
    raw = next(name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention))
    first = next(name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    for name in ("1.attention", raw, f"re:{raw}.*", "1", r"re:1\..*"):
        assert names(sparsify(copy.deepcopy(model), targets=[name])) == NAMES[1:3]
        assert names(sparsify(copy.deepcopy(model), ignore=[name])) == ["0", "2"]
    for name in ("0", first):
        options = {"read_directly": [name], "overrides": {name: {"power": 1.0}}}
        uses = [weight.uses[0] for weight in sparsify(copy.deepcopy(model), **options).weights]
        assert [use.form == "attribute" for use in uses] == [True, True, True, False]
        assert [use.binding.power for use in uses] == [1, 3, 3, 3]


@each_wrapper
def test_a_filter_function_gets_the_names_without_what_a_wrapper_adds(wrap: Callable[[nn.Module], nn.Module]) -> None:
    seen: list[str] = []
    sparsify(wrap(make_model()), filter_fn=lambda module, name: seen.append(name) or True)
    assert seen == ["0", "1.attention", "1.attention.out_proj", "2"]


@each_wrapper
@pytest.mark.parametrize("wrapped_first", [True, False])
def test_a_state_loads_whichever_model_is_wrapped(wrap: Callable[[nn.Module], nn.Module], wrapped_first: bool) -> None:
    models = wrap(make_model()), make_model()
    saving, loading = [sparsify(model) for model in (models if wrapped_first else models[::-1])]
    saving.step()
    loading.load_state_dict(saving.state_dict())
    assert loading.step_count == 1
    shapes = [8, 8], [24, 8], [8, 8], [4, 8]
    assert loading.state_dict()["layers"] == [f"{name} {shape}" for name, shape in zip(NAMES, shapes, strict=True)]


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module.", "_fsdp_wrapped_module."])
def test_a_state_that_has_the_names_of_wrappers_loads(prefix: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False), nn.Linear(8, 4))
    model[1].weight = model[0].weight
    sparsifier = sparsify(model)
    state = sparsifier.state_dict()
    assert state["layers"] == ["0 = 1 [8, 8]", "2 [4, 8]"]
    layers = [f"{prefix}0 = {prefix}1 [8, 8]", f"{prefix}2._checkpoint_wrapped_module [4, 8]"]
    old = {**state, "layers": layers, "step": 3}
    sparsifier.load_state_dict(old)
    assert sparsifier.step_count == 3
    with pytest.raises(ValueError, match=r"expected 2 \[4, 8\], got _orig_mod\.3 \[4, 8\]"):
        sparsifier.load_state_dict({**old, "layers": [layers[0], "_orig_mod.3 [4, 8]"]})


def test_a_state_of_a_wrapped_layer_loads_into_the_layer_itself() -> None:
    layer = nn.Linear(8, 8)
    assert names(sparsify(torch.compile(copy.deepcopy(layer)))) == ["(root)"]
    sparsifier = sparsify(layer)
    sparsifier.load_state_dict({**sparsifier.state_dict(), "layers": ["_orig_mod [8, 8]"], "step": 2})
    assert sparsifier.step_count == 2


def test_module_is_a_name_where_nothing_is_wrapped() -> None:
    model = nn.ModuleDict({"module": nn.Linear(4, 4), "head": nn.Linear(4, 4)})
    assert names(sparsify(model)) == ["module", "head"]
    scaled = nn.Module()
    scaled.register_parameter("scale", nn.Parameter(torch.ones(())))
    scaled.module = nn.Linear(4, 4)
    assert names(sparsify(scaled)) == ["module"]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda m: m.parameters(),
            r"got generator: Sparsifier\(.*\) takes the module, not its parameters\(\)",
        ),
        (lambda m: list(m), r"got list: Sparsifier\(model, \.\.\.\) takes the module that contains them"),
        (lambda m: m.state_dict(), "got OrderedDict: load the state_dict into a module"),
        (lambda m: torch.optim.SGD(m.parameters()), r"got SGD: .*sparsifier\.attach\(optimizer\)"),
        (lambda m: type(m), "got the class Sequential: pass an instance"),
        (lambda m: None, r"got None: Sparsifier\(model, \.\.\.\) takes the module itself"),
        (lambda m: m[0].weight, r"got Parameter: Sparsifier\(model, \.\.\.\) takes the module itself"),
    ],
)
def test_what_is_no_model_is_refused_with_the_right_call(make: Callable[[Any], Any], message: str) -> None:
    with pytest.raises(TypeError, match=rf"^model must be a torch\.nn\.Module, {message}"):
        fk.Sparsifier(make(make_model()), sparsity=0.5, total_steps=4)


@pytest.mark.parametrize("argument", ["targets", "ignore", "read_directly"])
@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        ("0", TypeError, "must be a sequence of names and classes, got '0'"),
        (nn.Linear, TypeError, "must be a sequence of names and classes, got .*Linear"),
        (nn.Linear(1, 1), TypeError, "must be a sequence of names and classes, got a Linear itself"),
        ((name for name in "0"), TypeError, "must be a sequence of names and classes, got <generator"),
        ([3], TypeError, "must contain names, re: patterns and classes of modules, got 3"),
        ([nn.Linear(1, 1)], TypeError, "must contain names, re: patterns and classes of modules, got a Linear itself"),
        (["re:("], ValueError, r"must have a regular expression after re:, got 're:\('"),
        (["9"], ValueError, "must match modules of the model, but '9' matches none"),
    ],
)
def test_bad_entries_are_refused(argument: str, value: Any, error: type[Exception], message: str) -> None:
    model = make_model()
    with pytest.raises(error, match=f"^{argument} {message}"):
        sparsify(model, **{argument: value})
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": "0.9", "total_steps": 9}, "sparsity must be a number, got '0.9'"),
        ({"sparsity": fk.ConstantSchedule(0.9)}, "sparsity must be a number, got Const.*pass a schedule by keyword"),
        ({"sparsity": 0.9, "total_steps": 9.0}, r"total_steps must be an integer, got 9\.0"),
        ({"schedule": 0.9}, r"schedule must have a method sparsity_at\(step\), got 0\.9"),
        ({"sparsity": 0.9, "total_steps": 9, "filter_fn": "0"}, "filter_fn must be a function .*got '0'"),
        ({"sparsity": 0.9, "total_steps": 9, "min_numel": "0"}, "min_numel must be a number, got '0'"),
        ({"sparsity": 0.9, "total_steps": 9, "overrides": ["0"]}, r"overrides must be a dict .*got \['0'\]"),
        ({"sparsity": 0.9, "total_steps": 9, "overrides": {0: {}}}, "overrides must contain names, .*got 0"),
        ({"sparsity": 0.9, "total_steps": 9, "capturable": "no"}, "capturable must be True or False, got 'no'"),
    ],
)
def test_options_of_another_type_are_refused_by_name(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError, match=f"^{message}"):
        fk.Sparsifier(make_model(), **arguments)
