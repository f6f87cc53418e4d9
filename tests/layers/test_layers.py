"""Making a layer sparse swaps its class and keeps everything else; its threshold moves with the weight."""

from __future__ import annotations

import abc
import copy
import io
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

import feather_kernels as fk
from feather_kernels.autograd import autocast_dtype
from feather_kernels.nn import SparseLayer
from feather_kernels.nn.thresholds import ThresholdBinding
from tests.support import nets


def sparsified(model: nn.Module, t: float = 0.05, grad_scale: float = 0.5) -> fk.Sparsifier:
    """A sparsifier whose threshold is set to ``t``."""
    sparsifier = fk.Sparsifier(model, sparsity=0.9, total_steps=100, grad_scale=grad_scale)
    assign(model, t)
    return sparsifier


def layers_of(model: nn.Module) -> list[SparseLayer]:
    return [m for m in model.modules() if isinstance(m, SparseLayer)]


def weight_thresholds(model: nn.Module) -> list[ThresholdBinding]:
    return [t for layer in layers_of(model) for t in layer.feather.thresholds.values()]


def assign(model: nn.Module, t: float) -> None:
    """Set the threshold of every layer through the object that they share."""
    weight_thresholds(model)[0].thresholds.assign(torch.tensor(t))


def thresholds_of(model: nn.Module) -> set[float]:
    """The different thresholds that the layers read; the layers must all be bound to one vector."""
    threshold = [t.value for t in weight_thresholds(model)]
    assert len({t.untyped_storage().data_ptr() for t in threshold}) == 1
    assert len({t.data_ptr() for t in threshold}) == len(threshold)
    return {t.item() for t in threshold}


def float32(value: float) -> float:
    return torch.tensor(value).item()


CONVS = {
    "plain": {},
    "stride": {"stride": (2, 1)},
    "padding": {"padding": (1, 2)},
    "padding same": {"padding": "same"},
    "padding valid": {"padding": "valid"},
    "dilation": {"dilation": 2},
    "groups": {"groups": 2},
    "no bias": {"bias": False},
    "circular": {"padding": 1, "padding_mode": "circular"},
    "reflect": {"padding": (2, 1), "padding_mode": "reflect"},
    "replicate": {"padding": 2, "padding_mode": "replicate", "dilation": 2, "stride": 2, "groups": 2},
}


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("name", [*CONVS, "linear", "linear no bias"])
def test_equals_the_dense_layer_on_thresholded_weights(name: str, scale: float) -> None:
    torch.manual_seed(0)
    dense = nn.Linear(9, 7, bias="no" not in name) if "linear" in name else nn.Conv2d(4, 6, (3, 2), **CONVS[name])
    layer = copy.deepcopy(dense)
    shape = (5, 3, 9) if "linear" in name else (2, 4, 11, 12)
    x, x_dense = (torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_() for _ in "ab")
    sparsified(layer, 0.1, scale)
    with torch.no_grad():
        mask = dense.weight.abs() > 0.1
        dense.weight.copy_(fk.functional.threshold(dense.weight, 0.1))
    y, y_dense = layer(x), dense(x_dense)
    assert y.equal(y_dense)
    g = torch.randn_like(y)
    y.backward(g)
    y_dense.backward(g)
    assert x.grad.equal(x_dense.grad)
    assert layer.weight.grad.equal(torch.where(mask, dense.weight.grad, dense.weight.grad * scale))
    if dense.bias is not None:
        assert layer.bias.grad.equal(dense.bias.grad)


def test_nothing_else_of_the_module_changes() -> None:
    model = nets.conv_net()
    parameters, keys, modules = list(model.parameters()), list(model.state_dict()), list(model.modules())
    calls: list[str] = []
    model[0].register_forward_hook(lambda *_: calls.append("hook"))
    before = {name: p.clone() for name, p in model.named_parameters()}
    sparsifier = sparsified(model)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(modules, model.modules(), strict=True))
    assert isinstance(model[0], nn.Conv2d)
    assert type(model[0]) is fk.nn.FeatherConv2d
    assert len(list(model.buffers())) == 3  # those of the BatchNorm
    model(nets.images())
    assert calls == ["hook"]
    assert all(p.equal(before[name]) for name, p in model.named_parameters()), "the latent weights stay dense"
    dense = nets.conv_net(seed=5)
    dense.load_state_dict(model.state_dict(), strict=True)
    model.load_state_dict(dense.state_dict(), strict=True)
    with pytest.warns(
        fk.SparsityWarning,
        match=r"counted 0 steps, and its schedule ends at step 50: the model is 0.0000% sparse, not the final 90",
    ):
        sparsifier.finalize()
    assert type(model[0]) is nn.Conv2d
    assert "feather" not in model[0].__dict__


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.float(),
        lambda m: m.to("cpu"),
        lambda m: m.to(memory_format=torch.channels_last),
        lambda m: m.requires_grad_(False),
        lambda m: m.share_memory(),
        lambda m: m.to_empty(device="cpu"),
    ],
    ids=["bfloat16", "half", "to-bfloat16", "float", "to-cpu", "channels_last", "frozen", "share_memory", "to_empty"],
)
def test_threshold_survives(cast: Callable[[nn.Module], nn.Module]) -> None:
    model = nets.conv_net()
    sparsifier = sparsified(model, 0.0123)
    cast(model)
    assert thresholds_of(model) == {float32(0.0123)}
    sparsifier._thresholds.assign(torch.tensor(0.5))
    assert thresholds_of(model) == {0.5}, "still linked to the sparsifier"


def test_shared_memory_is_shared_with_the_weight() -> None:
    model = nets.conv_net()
    sparsified(model)
    model.share_memory()
    assert all(t.value.is_shared() for t in weight_thresholds(model))


def test_double_widens_the_threshold_and_float_narrows_it() -> None:
    model = nets.conv_net()
    sparsifier = sparsified(model, 0.0123)
    model.double()
    assert sparsifier.threshold.dtype == torch.float64
    assert thresholds_of(model) == {float32(0.0123)}
    model(nets.images().double()).sum().backward()
    sparsifier.step()
    sparsifier.refresh(model)
    assert sparsifier.threshold.item() > 0
    model.float()
    assert sparsifier.threshold.dtype == torch.float32
    assert thresholds_of(model) == {sparsifier.threshold.item()}


def test_meta_to_empty_starts_at_zero_and_follows() -> None:
    with torch.device("meta"):
        model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5))
    assert sparsifier.threshold.device.type == "meta"
    model.to_empty(device="cpu")
    assert sparsifier.threshold.device.type == "cpu"
    assert sparsifier.threshold.item() == 0
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    sparsifier.refresh(model)
    assert sparsifier.threshold.item() > 0
    assert thresholds_of(model) == {sparsifier.threshold.item()}


@pytest.mark.parametrize("duplicate", [copy.deepcopy, nets.through_pickle, nets.through_torch_save])
def test_copies_have_a_threshold_of_their_own(duplicate: Callable[[nn.Module], nn.Module]) -> None:
    model = nets.conv_net()
    sparsified(model, 0.07)
    twin = duplicate(model)
    x = nets.images()
    assert twin(x).equal(model(x))
    assign(model, math.inf)
    assert thresholds_of(twin) == {float32(0.07)}
    assign(twin, 0.2)
    assert thresholds_of(twin) == {float32(0.2)}, "one object for all layers of the copy"
    assert thresholds_of(model) == {math.inf}


def test_load_onto_another_device() -> None:
    model, file = nets.conv_net(), io.BytesIO()
    sparsified(model, 0.07)
    torch.save(model, file)
    file.seek(0)
    moved = torch.load(file, weights_only=False, map_location="meta")
    assert {t.value.device.type for t in weight_thresholds(moved)} == {"meta"}
    assert moved(nets.images().to("meta")).shape == (8, 10)


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_as_one_graph_and_never_again(compiler: str) -> None:
    torch._dynamo.reset()
    model, x = nets.conv_net(), nets.images()
    sparsifier = sparsified(model)
    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for _ in range(30):
        compiled(x).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()  # its first call sees that the compiled forward ran
    assert counter.frame_count == 1
    model.eval()
    torch.testing.assert_close(compiled(x), copy.deepcopy(model)(x))


def test_compiled_inside_an_activation_checkpoint() -> None:
    torch._dynamo.reset()
    model, x = nets.conv_net(), nets.images()
    sparsifier = sparsified(model)
    first, rest = model[:4], model[4:]

    def forward(x: torch.Tensor) -> torch.Tensor:
        return rest(checkpoint(first, x, use_reentrant=False))

    torch.compile(forward, fullgraph=True, backend="aot_eager")(x).sum().backward()
    sparsifier.step()
    assert all(p.grad is not None for p in model.parameters())


def test_training_reads_the_thresholded_weight_only() -> None:
    layer = nn.Linear(4, 3)
    sparsified(layer, math.inf)
    x = torch.randn(2, 4)
    assert layer(x).equal(F.linear(x, torch.zeros(3, 4), layer.bias))


@pytest.mark.parametrize("rows", [2, 8])
def test_data_replaced_before_backward_is_refused(rows: int) -> None:
    """In a first layer, too, whose backward needs no P(w)."""
    model = nn.Sequential(nn.Linear(3, 4))
    sparsified(model)
    y = model(torch.randn(5, 3))
    model[0].weight.data = torch.randn(rows, 3)
    with pytest.raises(ValueError, match="must have the weight's shape"):
        y.sum().backward()


class Doubled(nn.Module):
    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return 2 * weight


TAKERS: dict[str, Callable[[nn.Module], Any]] = {
    "parametrized": lambda layer: nn.utils.parametrize.register_parametrization(layer, "weight", Doubled()),
    "weight_norm": nn.utils.parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.parametrizations.spectral_norm,
    "pruned by torch": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
}


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", [nn.Linear, nn.Conv1d, nn.ConvTranspose1d])
@pytest.mark.parametrize("taker", TAKERS)
def test_a_parameter_that_was_taken_away_is_named_in_the_forward(taker: str, kind: Any) -> None:
    model = nn.Sequential(kind(4, 4) if kind is nn.Linear else kind(4, 4, 3))
    fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5))
    TAKERS[taker](model[0])
    message = (
        rf"a sparse {kind.__name__} has lost its Parameter 'weight' to .*: remove that, or finalize\(\) or detach\(\)"
    )
    for call in (lambda: model(torch.randn(2, 4, 4)), model[0].latent, model.double):
        with pytest.raises(RuntimeError, match=message):
            call()


def test_forward_works_again_once_the_parametrization_is_gone() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4)), torch.randn(2, 4)
    fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5))
    y = model(x)
    nn.utils.parametrize.register_parametrization(model[0], "weight", Doubled())
    nn.utils.parametrize.remove_parametrizations(model[0], "weight", leave_parametrized=False)
    assert model(x).equal(y)


class Registered(nn.Linear):
    """A class whose subclasses must say what they are, and are remembered."""

    known: ClassVar[list[str]] = []

    def __init_subclass__(cls, *, task: str, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        cls.known.append(task)


class RegisteredReader(Registered, task="reading"):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class Meta(abc.ABCMeta):
    made: ClassVar[list[str]] = []

    def __init__(cls, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        Meta.made.append(cls.__name__)


class WithMeta(nn.Linear, metaclass=Meta):
    pass


class RegisteredGRU(nn.GRU):
    def __init_subclass__(cls, *, task: str) -> None:
        pass


@pytest.mark.parametrize("kind", [Registered, RegisteredReader, WithMeta, RegisteredGRU])
def test_classes_that_watch_their_subclasses(kind: type[nn.Module]) -> None:
    layer, x = kind(4, 4), torch.randn(2, 4)
    known = list(Registered.known)
    sparsifier = fk.Sparsifier(layer, schedule=fk.ConstantSchedule(0.5))
    assert isinstance(layer, SparseLayer)
    assert isinstance(layer, kind)
    assert Registered.known == known, "a sparse class is no class of the user's"
    y = layer(x)
    twin = copy.deepcopy(layer)(x)
    sparsifier.finalize()
    assert type(layer) is kind
    first = (lambda result: result[0]) if kind is RegisteredGRU else lambda result: result
    torch.testing.assert_close(first(layer(x)), first(y))
    torch.testing.assert_close(first(twin), first(y))


def test_autocast_of_devices_that_no_kernel_is_for() -> None:
    weight: Any = SimpleNamespace(device=torch.device("mps"), dtype=torch.float32)
    torch.set_autocast_enabled("mps", True)  # the context manager refuses it where there is none
    try:
        assert autocast_dtype(weight) == torch.get_autocast_dtype("mps")
    finally:
        torch.set_autocast_enabled("mps", False)
    assert autocast_dtype(weight) is None
