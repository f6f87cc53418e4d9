"""A forward uses the thresholds of the weights that it uses, whatever changed them."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

import feather_kernels as fk
from feather_kernels.nn import SparseLayer
from feather_kernels.sparsify.current_thresholds import CurrentThresholds
from tests.support import nets


def layers_of(model: nn.Module) -> list[SparseLayer]:
    return [module for module in model.modules() if isinstance(module, SparseLayer)]


def used_threshold(model: nn.Module) -> Tensor:
    return layers_of(model)[0].feather.thresholds["weight"].value.clone()


def wanted_threshold(model: nn.Module, sparsity: float) -> Tensor:
    """By the definition, from the latent weights as they are."""
    return fk.functional.magnitude_threshold([layer.latent() for layer in layers_of(model)], sparsity)


def zeros_used(model: nn.Module) -> int:
    return sum(int((layer.sparse_weight() == 0).sum()) for layer in layers_of(model))


def budget(model: nn.Module, sparsity: float) -> int:
    numel = sum(layer.latent().numel() for layer in layers_of(model))
    return math.floor((numel - 1) * sparsity) + 1 if sparsity else 0


def constant(sparsity: float = 0.7, **options: Any) -> tuple[nn.Module, fk.Sparsifier]:
    model = nets.conv_net()
    return model, fk.Sparsifier(model, schedule=fk.ConstantSchedule(sparsity), **options)


@contextmanager
def selections(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[CurrentThresholds]]:
    """Every selection made inside it."""
    made: list[CurrentThresholds] = []
    select = CurrentThresholds._select
    monkeypatch.setattr(
        CurrentThresholds, "_select", lambda self, *arguments: (made.append(self), select(self, *arguments))[1]
    )
    yield made
    monkeypatch.undo()


# ------------------------------------------------------------------------------------------------ what changes weights


def other_weights() -> dict[str, Tensor]:
    return {name: 2 * value for name, value in nets.conv_net(seed=3).state_dict().items()}


def swap_data(model: nn.Module) -> None:
    for layer in layers_of(model):
        layer.latent().data = layer.latent().detach() * 3


def replace_parameter(model: nn.Module) -> None:
    layer: Any = layers_of(model)[0]
    layer.weight = nn.Parameter(layer.weight.detach() * 3)


def lerp(model: nn.Module) -> None:
    """As schedule-free optimizers do in their ``eval()``."""
    for layer in layers_of(model):
        layer.latent().detach().lerp_(torch.randn_like(layer.latent()), 0.7)


CHANGES: dict[str, Callable[[nn.Module], object]] = {
    "load_state_dict": lambda model: model.load_state_dict(other_weights()),
    "load_state_dict, assign": lambda model: model.load_state_dict(other_weights(), assign=True),
    "load_state_dict of a child": lambda model: model[8].load_state_dict(
        {"weight": torch.randn(10, 64), "bias": torch.ones(10)}
    ),
    "in place": lambda model: [layer.latent().detach().mul_(3) for layer in layers_of(model)],
    "foreach": lambda model: torch._foreach_mul_([layer.latent().detach() for layer in layers_of(model)], 3.0),
    "data replaced": swap_data,
    "parameter replaced": replace_parameter,
    "lerp_": lerp,
    "initialised": lambda model: model.apply(
        lambda m: m.reset_parameters() if hasattr(m, "reset_parameters") else None
    ),
    "double": lambda model: model.double(),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("recompute", [None, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("scope", ["global", "layer"])
def test_next_forward_uses_the_threshold_of_the_changed_weights(
    change: str, recompute: bool | None, scope: str
) -> None:
    model, sparsifier = constant(recompute=recompute, scope=scope)
    model(nets.images()).sum().backward()
    sparsifier.step()
    CHANGES[change](model)
    x = nets.images().to(next(model.parameters()).dtype)
    y = model(x)
    for layer in layers_of(model):
        among = layers_of(model) if scope == "global" else [layer]
        expected = fk.functional.magnitude_threshold([other.latent() for other in among], 0.7)
        assert layer.feather.thresholds["weight"].value.equal(expected)
    again = model(x)
    assert again.equal(y) or model.training  # batch statistics are those of the batch
    y.sum().backward()
    sparsifier.step()


def test_a_training_step_selects_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sparsifier = constant()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with selections(monkeypatch) as made:
        for _ in range(3):
            model(nets.images()).sum().backward()
            optimizer.step()
            sparsifier.step()
            model(nets.images())
    assert len(made) == 3


def test_evaluation_between_the_optimizer_and_the_step() -> None:
    model, sparsifier = constant()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    model(nets.images()).square().sum().backward()
    optimizer.step()
    model(nets.images())
    assert zeros_used(model) == budget(model, 0.7)
    assert sparsifier.step_count == 0


def test_a_change_of_mode_selects_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which finds what no version shows."""
    model, _ = constant()
    model(nets.images())
    model[0].weight.data.mul_(5)
    model(nets.images())
    assert not used_threshold(model).equal(wanted_threshold(model, 0.7)), "the guide says so"
    with selections(monkeypatch) as made:
        model.eval()(nets.images())
        model.eval()(nets.images())
        model.train(False)
        model(nets.images())
        assert len(made) == 1
    assert used_threshold(model).equal(wanted_threshold(model, 0.7))


def test_refresh_selects_from_the_weights_as_they_are() -> None:
    model, sparsifier = constant()
    model[0].weight.data.mul_(5)
    sparsifier.refresh()
    assert used_threshold(model).equal(wanted_threshold(model, 0.7))
    average = AveragedModel(model)
    average.module[0].weight.data.mul_(5)
    sparsifier.refresh(average)
    assert used_threshold(average).equal(wanted_threshold(average, 0.7))
    assert not used_threshold(average).equal(used_threshold(model))
    other = nets.conv_net()
    fk.Sparsifier(other, schedule=fk.ConstantSchedule(0.5), ignore=["0"])
    for wrong in (other, nets.conv_net(), nn.ModuleList([model, average])):
        with pytest.raises(ValueError, match="model must be or contain one deep copy of the whole sparse model"):
            sparsifier.refresh(wrong)


# ------------------------------------------------------------------------------------------------ averages


def timm_ema(model: nn.Module) -> Any:
    return pytest.importorskip("timm.utils.model_ema").ModelEmaV3(model, decay=0.6)


AVERAGES: dict[str, Callable[[nn.Module], Any]] = {
    "EMA": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.6)),
    "EMA with buffers": lambda model: AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.6), use_buffers=True),
    "SWA": AveragedModel,
    "timm": timm_ema,
}


@pytest.mark.parametrize("kind", AVERAGES)
@pytest.mark.parametrize("attached", [False, True])
def test_averages_have_the_sparsity_of_every_step_of_the_ramp(kind: str, attached: bool) -> None:
    model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, sparsity=0.9, total_steps=12)
    average = AVERAGES[kind](model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    if attached:
        sparsifier.attach(optimizer)
    for step in range(1, 13):
        nn.functional.cross_entropy(model(nets.images()), torch.arange(8)).backward()
        optimizer.step()
        optimizer.zero_grad()
        if not attached:
            sparsifier.step()
        (average.update if kind == "timm" else average.update_parameters)(model)
        average.module.eval()(nets.images())
        assert used_threshold(average).equal(wanted_threshold(average, sparsifier.sparsity)), f"step {step}"
        assert zeros_used(average) == budget(model, sparsifier.sparsity)
        assert used_threshold(model).equal(wanted_threshold(model, sparsifier.sparsity))
    assert not used_threshold(average).equal(used_threshold(model))
    sparsifier.finalize()
    average.module(nets.images())
    assert zeros_used(average) == budget(average, 0.9)


def test_lightnings_weight_averaging() -> None:
    lightning = pytest.importorskip("lightning.pytorch")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nets.conv_net()
            self.sparsifier = fk.Sparsifier(self.net, sparsity=0.9, total_steps=8)
            self.seen: list[tuple[int, float]] = []

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Tensor, _: int) -> Tensor:
            return self.net(batch).square().mean()

        def validation_step(self, batch: Tensor, _: int) -> None:
            """Lightning has put the average's weights into the model."""
            self.net(batch)
            self.seen.append((zeros_used(self.net), budget(self.net, self.sparsifier.sparsity)))

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
            self.sparsifier.attach(optimizer)
            return optimizer

    module = Module()
    batches = torch.utils.data.DataLoader([nets.images()[0] for _ in range(8)], batch_size=4)
    callback = lightning.callbacks.WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.5))
    trainer = lightning.Trainer(
        max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], num_sanity_val_steps=0,
    )  # fmt: skip
    trainer.fit(module, batches, batches)
    assert len(module.seen) == 8
    assert all(zeros == wanted for zeros, wanted in module.seen)
    assert module.seen[-1][1] == budget(module.net, 0.9)


# ------------------------------------------------------------------------------------------------ copies


def test_copy_with_the_same_weights_keeps_its_threshold(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = constant(grad_scale=0.5)
    layers_of(model)[0].feather.thresholds["weight"].thresholds.assign(
        torch.tensor(0.123)
    )  # told apart from a selected
    model.eval()
    with selections(monkeypatch) as made:
        twins = [model, copy.deepcopy(model), copy.deepcopy(copy.deepcopy(model)), nets.through_pickle(model)]
        outputs = [twin(nets.images()) for twin in twins]
        assert all(y.equal(outputs[0]) for y in outputs)
    assert not made


def test_copy_of_a_model_whose_weights_have_changed_selects() -> None:
    model, _ = constant()
    with torch.no_grad():
        model[0].weight.mul_(4)
    for twin in (copy.deepcopy(model), nets.through_pickle(model)):
        twin(nets.images())
        assert used_threshold(twin).equal(wanted_threshold(twin, 0.7))


def test_copy_changed_before_its_first_forward_selects() -> None:
    model, _ = constant()
    for change in CHANGES.values():
        twin = copy.deepcopy(model)
        change(twin)
        twin(nets.images().to(twin[0].weight.dtype))
        assert used_threshold(twin).equal(wanted_threshold(twin, 0.7))


def test_copies_share_the_position_and_pickles_keep_its_value() -> None:
    model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, schedule=fk.LambdaSchedule(lambda step: 0.1 * step, final_sparsity=0.9))
    shared, kept = copy.deepcopy(model), None
    model(nets.images())
    for step in range(1, 5):
        sparsifier.step()
        kept = nets.through_pickle(model) if step == 2 else kept
    for twin, sparsity in ((shared, 0.4), (kept, 0.2)):
        assert twin is not None
        with torch.no_grad():
            twin[3].weight.mul_(2)
        twin(nets.images())
        assert used_threshold(twin).equal(wanted_threshold(twin, sparsity))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
def test_model_and_sparsifier_copied_together_are_a_pair_of_their_own(duplicate: Callable[[Any], Any]) -> None:
    model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, sparsity=0.9, total_steps=8)
    model(nets.images())
    sparsifier.step()
    twin, other = duplicate((model, sparsifier))
    assert other.model is twin
    twin(nets.images())
    for _ in range(3):
        other.step()
    assert (sparsifier.step_count, other.step_count) == (1, 4)
    average = copy.deepcopy(twin)
    with torch.no_grad():
        average[0].weight.mul_(2)
    for part, sparsity in ((model, sparsifier.sparsity), (twin, 0.9), (average, 0.9)):
        part(nets.images())
        assert used_threshold(part).equal(wanted_threshold(part, sparsity))
    other.finalize()
    assert not twin._forward_pre_hooks
    assert type(model[0]) is fk.nn.FeatherConv2d
    sparsifier.step()


def largest(weights: list[Tensor], sparsity: float) -> Tensor:
    return torch.stack([w.abs().mean() for w in weights])


def test_model_pickled_with_a_function_as_scope_keeps_its_thresholds(caplog: pytest.LogCaptureFixture) -> None:
    model, _ = constant(scope=lambda weights, s: largest(weights, s))
    twin, deep = nets.through_pickle(model), copy.deepcopy(model)
    assert twin(nets.images()).equal(model(nets.images()))
    before = used_threshold(twin)
    for copied in (twin, deep):
        with torch.no_grad():
            copied[0].weight.mul_(2)
        copied(nets.images())
    assert used_threshold(twin).equal(before)
    assert "pickled with a scope function keeps its pickled thresholds" in caplog.text
    assert used_threshold(deep).equal(2 * before), "a deep copy has the function"


# ------------------------------------------------------------------------------------------------ states


@pytest.mark.parametrize("model_first", [True, False])
def test_restored_thresholds_stay_until_the_next_step(model_first: bool) -> None:
    model, sparsifier = constant()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(nets.images()).sum().backward()
    optimizer.step()  # T is of the weights before it
    weights, state, before = copy.deepcopy(model.state_dict()), sparsifier.state_dict(), used_threshold(model)
    resumed, other = constant()
    for load in (0, 1) if model_first else (1, 0):
        if load == 0:
            resumed.load_state_dict(weights)
        else:
            other.load_state_dict(state)
    resumed(nets.images())
    resumed.eval()(nets.images())
    assert used_threshold(resumed).equal(before)
    resumed.train()(nets.images())
    other.step()
    assert used_threshold(resumed).equal(wanted_threshold(resumed, 0.7))


def test_inference_mode_and_back() -> None:
    """Thresholds made or written in inference mode are ordinary tensors afterwards."""
    model = nets.conv_net()
    with torch.inference_mode():
        sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=10, scope="layer", grad_scale=lambda s: 1 - s / 2)
    model(nets.images()).sum().backward()
    sparsifier.step()
    average = copy.deepcopy(model)
    with torch.inference_mode():
        average[0].weight.mul_(2)
        average(nets.images())
        sparsifier.refresh(average)
    average(nets.images()).sum().backward()
    sparsifier.refresh(average)
    for _ in range(3):
        model(nets.images()).sum().backward()
        sparsifier.step()


# ------------------------------------------------------------------------------------------------ where it does nothing


def stale() -> tuple[nn.Module, Tensor]:
    """A model whose weights have changed, and its threshold of before."""
    model, _ = constant()
    with torch.no_grad():
        model[0].weight.mul_(4)
    return model, used_threshold(model)


def test_nothing_in_compiled_code() -> None:
    torch._dynamo.reset()
    model, before = stale()
    torch.compile(model, fullgraph=True, backend="aot_eager")(nets.images())
    assert used_threshold(model).equal(before)


def test_nothing_inside_a_backward_pass() -> None:
    """A checkpointed forward that is run again must see the thresholds of the first."""
    model, _ = constant()
    y = checkpoint(model, nets.images().requires_grad_(), use_reentrant=False)
    before = used_threshold(model)
    with torch.no_grad():
        model[0].weight.mul_(4)
    y.sum().backward()
    assert used_threshold(model).equal(before)
    assert all(layer.latent().grad is not None for layer in layers_of(model))
    model(nets.images())
    assert not used_threshold(model).equal(before)


def test_functional_calls_leave_the_thresholds_alone() -> None:
    model, _ = constant()
    model.eval()
    before = used_threshold(model)
    parameters = {name: 3 * p.detach() for name, p in model.named_parameters()}
    torch.func.functional_call(model, parameters, (nets.images(),))
    torch.func.vmap(lambda x: torch.func.functional_call(model, parameters, (x[None],)))(nets.images())
    torch.func.grad(lambda p: torch.func.functional_call(model, p, (nets.images(),)).sum())(parameters)
    assert used_threshold(model).equal(before)


def test_nothing_in_transforms() -> None:
    """Which allow no writes to what they have not been given; a change of mode is noticed afterwards all the same."""
    model, before = stale()
    model(nets.images())
    model[0].weight.data.mul_(5)
    model.eval()
    before = used_threshold(model)
    torch.func.vmap(lambda x: model(x[None])[0])(nets.images())
    torch.func.jacrev(model)(nets.images()[:1])
    assert used_threshold(model).equal(before)
    model(nets.images())
    assert used_threshold(model).equal(wanted_threshold(model, 0.7))


def test_ddp_and_compiled_wrappers_reach_the_hook(tmp_path: Any) -> None:
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model, sparsifier = constant()
        parallel = nn.parallel.DistributedDataParallel(model)
        with torch.no_grad():
            model[0].weight.mul_(4)
        parallel(nets.images()).sum().backward()
        assert used_threshold(model).equal(wanted_threshold(model, 0.7))
        sparsifier.step()
        assert copy.deepcopy(model)(nets.images()).equal(model(nets.images()))
    finally:
        dist.destroy_process_group()


def test_weight_of_another_shape_is_an_error() -> None:
    model, sparsifier = constant()
    model(nets.images())
    model[8].weight = nn.Parameter(torch.randn(20, 64))
    with pytest.raises(RuntimeError, match=r"the weight of 8 had shape \(10, 64\) when .* sparse, now \(20, 64\)"):
        sparsifier.step()


# ------------------------------------------------------------------------------------------------ what a review found


def test_average_made_after_a_resume_follows_its_weights() -> None:
    model, sparsifier = constant()
    model(nets.images())
    state, weights = sparsifier.state_dict(), copy.deepcopy(model.state_dict())
    resumed, other = constant()
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    average = AveragedModel(resumed)
    assert average(nets.images()).equal(resumed(nets.images()))
    with torch.no_grad():
        average.module[0].weight.mul_(3)
    average(nets.images())
    assert used_threshold(average).equal(wanted_threshold(average, 0.7))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda parts: pickle.loads(pickle.dumps(parts))])
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_average_copied_with_model_and_sparsifier_follows_the_copy(duplicate: Any, order: tuple[int, ...]) -> None:
    model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, sparsity=0.9, total_steps=8)
    parts = [model, sparsifier, AveragedModel(model)]
    model(nets.images())
    copied: dict[int, Any] = dict(zip(order, duplicate([parts[i] for i in order]), strict=True))
    for _ in range(4):
        copied[1].step()
    with torch.no_grad():
        copied[2].module[0].weight.mul_(2)
    copied[2](nets.images())
    assert used_threshold(copied[2]).equal(wanted_threshold(copied[2], 0.9))
    assert sparsifier.sparsity == 0


def test_refresh_leaves_models_of_other_sparsifiers_alone() -> None:
    (_, first), (model, second) = constant(0.2), constant(0.9)
    with pytest.raises(ValueError, match="got Sequential with none"):
        first.refresh(model)
    model(nets.images())
    second.step()
    assert used_threshold(model).equal(wanted_threshold(model, 0.9))


@pytest.mark.parametrize("use", [lambda m: m[:3], lambda m: m.forward], ids=["part", "forward"])
def test_copy_that_bypasses_the_hook_warns_once(use: Callable[[Any], Any]) -> None:
    model, _ = constant()
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="still those that were copied") as caught:
        use(twin)(nets.images())
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        use(twin)(nets.images())
        copy.deepcopy(model)(nets.images())
        model[:3](nets.images())


def test_average_of_inference_tensors_selects() -> None:
    model, _ = constant()
    with torch.inference_mode():
        average = copy.deepcopy(model)
        average(nets.images())
        average[0].weight.mul_(3)
        average(nets.images())
        assert used_threshold(average).equal(wanted_threshold(average, 0.7))


def test_subclass_of_parameter_is_followed() -> None:
    class Marked(nn.Parameter):
        pass

    model = nn.Sequential(nn.Linear(8, 8))
    model[0].weight = Marked(model[0].weight.detach())
    fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.7))
    with torch.no_grad():
        model[0].weight.copy_(torch.randn(8, 8) * 3)
    model(torch.randn(2, 8))
    assert used_threshold(model).equal(wanted_threshold(model, 0.7))


def test_second_use_of_a_tied_weight_is_watched() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.7))
    model(torch.randn(2, 8))
    model[1].weight = nn.Parameter(torch.randn(8, 8))
    with pytest.raises(RuntimeError, match="the weight of 0 = 1 is no longer tied"):
        model(torch.randn(2, 8))


def test_snapshot_keeps_its_thresholds_over_changes_of_mode() -> None:
    model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, sparsity=0.9, total_steps=8)
    model(nets.images())
    sparsifier.step()
    snapshot, expected = copy.deepcopy(model), used_threshold(model)
    for _ in range(5):
        sparsifier.step()
    for training in (True, False, True):
        snapshot.train(training)(nets.images())
    assert used_threshold(snapshot).equal(expected)


@pytest.mark.parametrize("recompute", [None, True], ids=["kept", "recomputed"])
def test_evaluation_between_forward_and_backward(recompute: bool | None) -> None:
    model, _ = constant(recompute=recompute, grad_scale=0.5)
    expected = torch.autograd.grad(model(nets.images()).square().sum(), list(model.parameters()))
    loss = model(nets.images()).square().sum()
    model.eval()(nets.images())
    model.train()
    for got, wanted in zip(torch.autograd.grad(loss, list(model.parameters())), expected, strict=True):
        torch.testing.assert_close(got, wanted)


def test_report_and_state_are_of_the_weights_as_they_are() -> None:
    model, sparsifier = constant()
    model.load_state_dict(other_weights())
    assert sparsifier.report().zeros == budget(model, 0.7)
    model.load_state_dict(nets.conv_net(seed=9).state_dict())
    assert sparsifier.state_dict()["thresholds"][0].equal(wanted_threshold(model, 0.7))


def test_thresholds_in_shared_memory_are_written_by_step_alone() -> None:
    """Another process has versions, and a position, of its own; it must not change what this one trains with."""
    model, sparsifier = constant()
    model.share_memory()
    sparsifier.step()
    before = used_threshold(model)
    twin = nets.through_pickle(model)
    for layer, original in zip(layers_of(twin), layers_of(model), strict=True):
        layer.feather.thresholds["weight"].value.data.set_(original.feather.thresholds["weight"].value.data)
    with torch.no_grad():
        model[0].weight.mul_(3)
    model(nets.images())
    assert used_threshold(model).equal(before)
    sparsifier.step()
    assert used_threshold(model).equal(wanted_threshold(model, 0.7))


def test_threads_that_share_a_recurrent_layer() -> None:
    layer = nn.LSTM(8, 8)
    fk.Sparsifier(nn.Sequential(layer), schedule=fk.ConstantSchedule(0.7))
    x = torch.randn(3, 2, 8)

    def run(_: int) -> Tensor:
        with torch.no_grad():
            return layer(x)[0]

    expected = run(0)
    with ThreadPoolExecutor(4) as pool:
        assert all(y.equal(expected) for y in pool.map(run, range(400)))


def test_layer_parametrized_while_sparse_is_left_whole() -> None:
    model, sparsifier = constant()
    torch.nn.utils.parametrize.register_parametrization(model[8], "bias", nn.Identity())
    for end in (sparsifier.finalize, sparsifier.detach):
        with pytest.raises(RuntimeError, match="8 was parametrized after it was made sparse"):
            end()
    assert "FeatherLinear" in repr(model)
    torch.nn.utils.parametrize.remove_parametrizations(model[8], "bias")
    sparsifier.finalize()
    model(nets.images())


@pytest.mark.parametrize("order", ["average compiled", "model compiled"])
def test_compiled_averages_follow_the_ramp_from_step_to_step(order: str) -> None:
    """Their hook never runs; step() selects for copies whose hook has not run, from the weights that they have then."""
    torch._dynamo.reset()
    model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    if order == "average compiled":
        average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9))
        compiled = torch.compile(average, backend="aot_eager")
    else:
        compiled = average = AveragedModel(torch.compile(model, backend="aot_eager"))
    for _ in range(6):
        model(nets.images()).square().mean().backward()
        optimizer.step()
        average.update_parameters(model)
        sparsifier.step()
    with torch.no_grad():
        compiled.eval()(nets.images())
    assert used_threshold(average).equal(wanted_threshold(average, 0.8))
    assert zeros_used(average) == budget(average, 0.8)


def test_copies_that_run_cost_the_step_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, sparsifier = constant()
    snapshot, average = copy.deepcopy(model), copy.deepcopy(model)
    with torch.no_grad():
        average[0].weight.mul_(2)
    average(nets.images())
    with torch.no_grad():
        average[0].weight.mul_(2)
    with selections(monkeypatch) as made:
        sparsifier.step()
    assert made == [sparsifier._current_thresholds]
    del snapshot


def test_a_changed_copy_is_no_error_of_the_step() -> None:
    model, sparsifier = constant()
    twin = copy.deepcopy(model)
    twin[8].weight = nn.Parameter(torch.randn(20, 64))
    sparsifier.step()
    sparsifier.step()
    with pytest.raises(RuntimeError, match="the weight of 8 had shape"):
        twin(nets.images())


class HandWrittenAverage:
    """As ema-pytorch and many repositories have it: writes through ``.data``, which counts no version."""

    def __init__(self, model: nn.Module) -> None:
        self.model = copy.deepcopy(model).eval()

    def update(self, model: nn.Module) -> None:
        for average, parameter in zip(self.model.parameters(), model.parameters(), strict=True):
            average.data.mul_(0.5).add_(parameter.data, alpha=0.5)


@pytest.mark.parametrize("capturable", [False, True])
def test_averages_that_write_data_follow_the_ramp(capturable: bool) -> None:
    model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=10, capturable=capturable)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    average = HandWrittenAverage(model)
    for _ in range(6):
        model(nets.images()).square().mean().backward()
        optimizer.step()
        sparsifier.step()
        average.update(model)
        average.model(nets.images())
        assert zeros_used(average.model) == budget(average.model, sparsifier.sparsity)
        assert used_threshold(average.model).equal(wanted_threshold(average.model, sparsifier.sparsity))


def test_a_snapshot_keeps_its_thresholds_while_the_model_steps_on(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=10)
    for _ in range(2):
        sparsifier.step()
    snapshot = copy.deepcopy(model)
    before, wanted = used_threshold(snapshot), snapshot(nets.images())
    for training in (False, True, False):
        sparsifier.step()
        with torch.no_grad():
            model[0].weight.mul_(1.1)
        with selections(monkeypatch) as made:
            assert snapshot.train(training)(nets.images()).shape == wanted.shape
        assert not made
    assert used_threshold(snapshot).equal(before)
    assert not used_threshold(model).equal(before)


def test_traces_after_a_change_of_mode() -> None:
    model, sparsifier = constant()
    model(nets.images()).sum().backward()
    sparsifier.step()
    model.eval()
    traced = torch.jit.trace(model, nets.images(), check_trace=False)
    with torch.no_grad():
        torch.testing.assert_close(traced(nets.images()), model(nets.images()))


@pytest.mark.parametrize("swap", [False, True])
def test_models_whose_tensors_are_swapped(swap: bool) -> None:
    model, _ = constant()
    model(nets.images())
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    model(nets.images().double())
    assert used_threshold(model).equal(wanted_threshold(model, 0.7))


@pytest.mark.parametrize("end", ["finalize", "detach"])
def test_a_copy_that_has_ended_is_no_concern_of_the_step(end: str) -> None:
    model, sparsifier = constant()
    plain, its_own = copy.deepcopy((model, sparsifier))
    getattr(its_own, end)()
    plain.half()
    sparsifier.step()
    assert used_threshold(model).equal(wanted_threshold(model, 0.7))


def test_a_snapshot_written_through_data_is_found_at_the_next_change_of_mode() -> None:
    model, sparsifier = constant()
    sparsifier.step()
    snapshot = copy.deepcopy(model)
    snapshot(nets.images())
    for layer in layers_of(snapshot):
        layer.latent().data.mul_(3)
    snapshot.eval()(nets.images())
    assert used_threshold(snapshot).equal(wanted_threshold(snapshot, 0.7))
