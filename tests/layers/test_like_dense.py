"""Code behind a sparse layer, or code that traces it, sees a tensor and an op as from the dense layer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import feather_kernels as fk
from feather_kernels.nn import SparseLayer
from tests.support import nets

MODES = pytest.mark.parametrize("recompute", [None, True], ids=["kept", "recomputed"])


def sparsify(model: nn.Module, recompute: bool | None, **options: Any) -> fk.Sparsifier:
    options = {"schedule": fk.ConstantSchedule(0.5), "grad_scale": 0.5, **options}
    return fk.Sparsifier(model, recompute=recompute, **options)


# ------------------------------------------------------------------------------------------------ in-place ops

LAYERS: dict[str, tuple[Callable[[], nn.Module], list[tuple[int, ...]]]] = {
    "Linear": (lambda: nn.Linear(6, 6), [(6,), (4, 6), (2, 4, 6), (2, 2, 3, 6)]),
    "Linear no bias": (lambda: nn.Linear(6, 6, bias=False), [(6,), (4, 6), (2, 4, 6)]),
    "Conv1d": (lambda: nn.Conv1d(4, 6, 3, padding="same"), [(4, 7), (2, 4, 7)]),
    "Conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1), [(4, 5, 5), (2, 4, 5, 5)]),
    "Conv2d circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), [(4, 5, 5), (2, 4, 5, 5)]),
    "Conv3d": (lambda: nn.Conv3d(2, 3, 3), [(2, 4, 4, 4), (1, 2, 4, 4, 4)]),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(4, 3, 3), [(4, 7), (2, 4, 7)]),
    "ConvTranspose2d": (lambda: nn.ConvTranspose2d(4, 3, 3), [(4, 5, 5), (2, 4, 5, 5)]),
    "ConvTranspose3d": (lambda: nn.ConvTranspose3d(2, 3, 2), [(2, 3, 3, 3), (1, 2, 3, 3, 3)]),
}
ROWS = [(name, shape) for name, (_, shapes) in LAYERS.items() for shape in shapes]
IN_PLACE: dict[str, Callable[[Tensor], Tensor]] = {
    "relu_": lambda y: y.relu_(),
    "add_": lambda y: y.add_(1),
    "part": lambda y: y[..., :2].mul_(3),
    "transposed": lambda y: y.mT.mul_(2) if y.dim() > 1 else y.mul_(2),
}


@MODES
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize(("name", "shape"), ROWS, ids=lambda x: x if isinstance(x, str) else f"{len(x)}d")
def test_output_changed_in_place(
    name: str, shape: tuple[int, ...], change: str, autocast: bool, recompute: bool | None
) -> None:
    torch.manual_seed(0)
    layer = LAYERS[name][0]()
    dense = copy.deepcopy(layer)
    sparsify(layer, recompute)
    with torch.no_grad():
        dense.weight.copy_(layer.sparse_weight())
    results = []
    for module in (layer, dense):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            y = module(x)
        form = y.shape, y.dtype, y.stride(), y.requires_grad, y.is_leaf
        IN_PLACE[change](y)
        y.float().square().sum().backward()
        results.append((form, y.detach(), x.grad, module.bias.grad if module.bias is not None else torch.zeros(1)))
    assert results[0][0] == results[1][0]
    for ours, theirs in zip(results[0][1:], results[1][1:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-2 if autocast else 1e-5, atol=1e-2 if autocast else 1e-5)
    scale = torch.where(dense.weight == 0, 0.5, 1.0)
    tolerance = 2e-2 if autocast else 1e-5
    torch.testing.assert_close(layer.weight.grad, dense.weight.grad * scale, rtol=tolerance, atol=tolerance)


READ: dict[str, tuple[Callable[[], nn.Module], Callable[[nn.Module, Tensor], Tensor]]] = {
    "reader": (lambda: nets.Reader(6, 6), lambda m, x: m(x)),
    "attention": (lambda: nn.MultiheadAttention(6, 2, batch_first=True), lambda m, x: m(x, x, x)[0]),
    "GRU": (lambda: nn.GRU(6, 6, batch_first=True), lambda m, x: m(x)[0]),
    "RNN": (lambda: nn.RNN(6, 6, batch_first=True), lambda m, x: m(x)[0]),
}


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("change", IN_PLACE)
@pytest.mark.parametrize("shape", [(3, 6), (2, 3, 6)], ids=["2d", "3d"])
@pytest.mark.parametrize("name", READ)
def test_output_of_read_and_recurrent_layers_changed_in_place(
    name: str, shape: tuple[int, ...], change: str, autocast: bool
) -> None:
    torch.manual_seed(0)
    make, run = READ[name]
    layer = make()
    dense = copy.deepcopy(layer)
    sparsify(layer, None, grad_scale=1.0)
    with torch.no_grad():
        for module, twin in zip(layer.modules(), dense.modules(), strict=True):
            for parameter in module.feather.thresholds if isinstance(module, SparseLayer) else ():
                twin._parameters[parameter].copy_(module.sparse_weight(parameter))
    results = []
    for module in (layer, dense):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1)).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16) if autocast else nullcontext():
            y = run(module, x)
        form = y.shape, y.dtype, y.stride(), y.requires_grad, y.is_leaf
        IN_PLACE[change](y)
        y.float().square().sum().backward()
        results.append((form, [y.detach(), x.grad, *(p.grad for p in module.parameters())]))
    assert results[0][0] == results[1][0]
    torch.testing.assert_close(results[0][1], results[1][1], **({"rtol": 2e-2, "atol": 2e-2} if autocast else {}))


# ------------------------------------------------------------------------------------------------ shapes with zeros

EMPTY: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "no rows": (lambda: nn.Linear(4, 3), (0, 4)),
    "no rows of many": (lambda: nn.Linear(4, 3), (2, 0, 4)),
    "no inputs": (lambda: nn.Linear(0, 3), (2, 0)),
    "no inputs, 3-D": (lambda: nn.Linear(0, 3), (2, 5, 0)),
    "no outputs": (lambda: nn.Linear(4, 0), (2, 4)),
    "no images": (lambda: nn.Conv2d(3, 4, 3), (0, 3, 5, 5)),
    "no images, transposed": (lambda: nn.ConvTranspose2d(3, 4, 3), (0, 3, 5, 5)),
    "no signals": (lambda: nn.Conv1d(3, 4, 3, padding="same"), (0, 3, 5)),
}


@MODES
@pytest.mark.parametrize("case", EMPTY)
@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")
def test_shapes_with_zeros(case: str, recompute: bool | None) -> None:
    make, shape = EMPTY[case]
    layer = make()
    dense = copy.deepcopy(layer)
    sparsify(nn.ModuleList([layer, nn.Linear(3, 3)]), recompute)
    assert isinstance(layer, SparseLayer)
    with torch.no_grad():
        dense.weight.copy_(layer.sparse_weight())
    x, x_dense = torch.randn(shape, requires_grad=True), torch.randn(shape, requires_grad=True)
    y, y_dense = layer(x), dense(x_dense)
    assert y.equal(y_dense) or y.shape == y_dense.shape
    y.sum().backward()
    y_dense.sum().backward()
    for ours, theirs in ((x.grad, x_dense.grad), *((layer.weight.grad, dense.weight.grad),)):
        assert ours is not None
        assert theirs is not None
        assert ours.shape == theirs.shape
        torch.testing.assert_close(ours, theirs)


# ------------------------------------------------------------------------------------------------ tracers


def images() -> Tensor:
    return nets.images(2, 6)


@MODES
def test_fx_calls_sparse_layers_as_one_node(recompute: bool | None) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nets.Reader(128, 6), nn.Linear(6, 4))
    sparsifier = sparsify(model, recompute)
    traced = torch.fx.symbolic_trace(model)
    assert [node.target for node in traced.graph.nodes if node.op == "call_module"] == ["0", "1", "2", "3"]
    y = traced(images())
    assert y.equal(model(images()))
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters())
    twin = copy.deepcopy(traced)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-2)
    y = model(images())  # whose hook selects the thresholds of the new weights
    assert traced(images()).equal(y), "the trace follows the weights"
    with pytest.warns(fk.SparsityWarning, match="thresholds of this copy"):
        assert not twin(images()).equal(traced(images()))
    sparsifier.step()


def test_feature_extractor_of_torchvision() -> None:
    torchvision = pytest.importorskip("torchvision")
    from torchvision.models.feature_extraction import create_feature_extractor

    model = torchvision.models.resnet18(weights=None, num_classes=10).eval()
    sparsify(model, None)
    extract = create_feature_extractor(model, ["layer1.0.conv1", "fc"])
    x = torch.randn(1, 3, 32, 32)
    features = extract(x)
    assert features["fc"].equal(model(x))
    assert features["layer1.0.conv1"].shape == (1, 64, 8, 8)


def test_flop_counters_see_the_dense_ops() -> None:
    from torch.utils.flop_counter import FlopCounterMode

    model, dense = nets.CalledAndRead(), nets.CalledAndRead()
    sparsify(model, None)
    counts = []
    for module in (model, dense):
        with FlopCounterMode(display=False) as counter:
            module(images()).sum().backward()
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


# ------------------------------------------------------------------------------------------------ kept methods


@dataclass
class Wrapped:
    """A layer whose forward somebody wraps, as hook libraries do, before or after it is made sparse."""

    layer: nn.Module
    x: Tensor

    def wrap(self) -> None:
        inner = self.layer.forward
        self.layer.forward = lambda *args: inner(*args)  # type: ignore[method-assign]


WRAPPED: dict[str, Callable[[], Wrapped]] = {
    "Linear": lambda: Wrapped(nn.Linear(8, 8), torch.randn(2, 8)),
    "Conv2d": lambda: Wrapped(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 5, 5)),
    "ConvTranspose1d": lambda: Wrapped(nn.ConvTranspose1d(3, 4, 3), torch.randn(1, 3, 5)),
    "Reader": lambda: Wrapped(nets.Reader(8, 8), torch.randn(2, 8)),
    "GRU": lambda: Wrapped(nn.GRU(8, 8), torch.randn(2, 8)),
}


def output(module: nn.Module, x: Tensor) -> Tensor:
    y = module(x)
    return y[0] if isinstance(y, tuple) else y


@pytest.mark.parametrize("case", WRAPPED)
def test_forward_wrapped_while_sparse_goes_on_dense(case: str) -> None:
    wrapped = WRAPPED[case]()
    model = nn.Sequential(wrapped.layer)
    sparsifier = sparsify(model, None)
    expected = output(model, wrapped.x)
    wrapped.wrap()
    assert output(model, wrapped.x).equal(expected)
    expected.sum().backward()
    sparsifier.step()
    sparsifier.finalize()
    torch.testing.assert_close(output(model, wrapped.x), expected)


@pytest.mark.parametrize("case", [case for case in WRAPPED if case != "GRU"])
def test_forward_wrapped_before_reads_the_sparse_weight(case: str) -> None:
    wrapped = WRAPPED[case]()
    wrapped.wrap()
    model = nn.Sequential(wrapped.layer)
    sparsifier = sparsify(model, None)
    y = output(model, wrapped.x)
    y.sum().backward()
    sparsifier.step()  # which checks that every layer took part
    sparsifier.finalize()
    torch.testing.assert_close(output(model, wrapped.x), y)


def test_wrapper_that_keeps_the_dense_weights_is_named() -> None:
    wrapped = WRAPPED["GRU"]()
    wrapped.wrap()
    model = nn.Sequential(wrapped.layer)
    sparsifier = sparsify(model, None)
    with pytest.warns(fk.SparsityWarning, match="its Parameter itself is an operand of gru"):
        output(model, wrapped.x).sum().backward()
    with pytest.raises(RuntimeError, match=r"0\.weight_ih_l0 \(whose forward is Wrapped\.wrap\.<locals>\.<lambda>\)"):
        sparsifier.step()


def test_warnings_of_a_step_are_those_of_a_dense_one() -> None:
    model = nets.CalledAndRead()
    sparsifier = sparsify(model, None)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(images()).sum().backward()
        sparsifier.step()
