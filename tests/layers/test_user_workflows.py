"""User habits outside of the matrix: autocast in one op, averages, lazy and shared modules, regional compilation."""

from __future__ import annotations

import copy
import math
import threading
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils._python_dispatch import TorchDispatchMode

import feather_kernels as fk
from tests.support import nets


class Calls(TorchDispatchMode):
    """Every op with the dtypes and numels of its tensor arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[str, list[tuple[torch.dtype, int]], Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        tensors = [(a.dtype, a.numel()) for a in args if isinstance(a, torch.Tensor)]
        self.calls.append((func.name(), tensors, getattr(result, "dtype", None)))
        return result


@pytest.mark.parametrize("layer", ["linear", "conv"])
def test_autocast_thresholds_and_casts_in_one_op_each_way(layer: str) -> None:
    model: nn.Module = nn.Linear(16, 24) if layer == "linear" else nn.Conv2d(16, 24, 1)
    x = torch.randn(4, 16) if layer == "linear" else torch.randn(4, 16, 3, 3)
    fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5), grad_scale=0.5)
    numel = model.weight.numel()
    with Calls() as mode:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = model(x)
        y.sum().backward()
    on_weights = [(name, result) for name, tensors, result in mode.calls if (torch.float32, numel) in tensors]
    assert [name for name, _ in on_weights if name.startswith("feather_kernels")] == [
        "feather_kernels::threshold",
        "feather_kernels::scale_pruned_grad",
    ]
    assert on_weights[0] == ("feather_kernels::threshold", torch.bfloat16)
    casts = [name for name, tensors, _ in mode.calls if "_to_copy" in name and tensors[0][1] == numel]
    assert not casts, "no cast of a weight or its gradient on its own"
    inputs = [name for name, tensors, _ in mode.calls if "_to_copy" in name and tensors[0][1] == x.numel()]
    assert len(inputs) == 1, "x is cast once"


def test_autocast_equals_the_unfused_order_bit_for_bit() -> None:
    torch.manual_seed(0)
    model, dense = nn.Linear(32, 16), nn.Linear(32, 16)
    dense.load_state_dict(model.state_dict())
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.7), grad_scale=0.5)
    x, t = torch.randn(8, 32), sparsifier.threshold
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(x)
        sparse = fk.functional.threshold(dense.weight, t, grad_scale=torch.tensor(0.5))
        y_unfused = nn.functional.linear(x, sparse, dense.bias)
    assert y.equal(y_unfused)
    y.float().square().sum().backward()
    y_unfused.float().square().sum().backward()
    assert model.weight.grad.equal(dense.weight.grad)
    assert model.bias.grad.equal(dense.bias.grad)


@pytest.mark.parametrize("buffers", [False, True])
@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_averaged_models_have_exact_zeros(kind: str, buffers: bool) -> None:
    model, x, y = nets.conv_net(), nets.images(), torch.arange(8)
    sparsifier = fk.Sparsifier(model, sparsity=0.9, total_steps=10)
    averaging = {"multi_avg_fn": get_ema_multi_avg_fn(0.7)} if kind == "ema" else {}
    average = AveragedModel(model, use_buffers=buffers, **averaging)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(10):
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()
        average.update_parameters(model)
    sparsifier.refresh(average.module)
    layers = [m for m in average.modules() if isinstance(m, fk.nn.SparseLayer)]
    zeros = sum(int((layer.sparse_weight() == 0).sum()) for layer in layers)
    count = sum(layer.latent().numel() for layer in layers)
    assert zeros == math.floor((count - 1) * 0.9) + 1
    torch.optim.swa_utils.update_bn([x], average)


def test_copy_made_layer_by_layer_is_refused() -> None:
    model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.6))
    twin = nn.Sequential(*[copy.deepcopy(layer) for layer in model])
    with pytest.raises(ValueError, match="the whole sparse model, got Sequential with none"):
        sparsifier.refresh(twin)


def test_lazy_modules_after_their_first_forward() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(3))
    with pytest.raises(ValueError, match="not initialised: run one forward pass first"):
        fk.Sparsifier(model, sparsity=0.5, total_steps=4)
    model(torch.randn(2, 5))
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5))
    assert sparsifier.report().numel == 5 * 8 + 8 * 3


def test_convolution_and_batch_norm_fuse_after_finalize() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)).eval()
    fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5)).finalize()
    x = torch.randn(2, 3, 8, 8)
    fused = nn.utils.fuse_conv_bn_eval(model[0], model[1])
    torch.testing.assert_close(fused(x), model(x))
    assert (fused.weight == 0).equal(model[0].weight == 0)


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compile_modes_and_blocks(mode: str) -> None:
    """A whole model, then block by block: one graph serves all blocks, and the first step sees each of them run."""
    torch._dynamo.reset()
    model = nn.Sequential(*[nn.Sequential(nn.Linear(16, 16), nn.GELU()) for _ in range(4)])
    sparsifier = fk.Sparsifier(model, sparsity=0.5, total_steps=8)
    x = torch.randn(3, 16)
    compiled = torch.compile(model, mode=mode, fullgraph=True)
    y = compiled(x)
    torch.testing.assert_close(y, model(x))
    y.sum().backward()
    sparsifier.step()
    sparsifier.detach()

    torch._dynamo.reset()
    sparsifier = fk.Sparsifier(model, sparsity=0.5, total_steps=8)
    for block in model:
        block.compile(backend="aot_eager", fullgraph=True)
    for _ in range(4):
        model(x).sum().backward()
        sparsifier.step()
    assert sparsifier.report().zeros > 0


def test_ties_that_break_are_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    model[1].weight = model[0].weight
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    with pytest.raises(RuntimeError, match="weight of 0 = 1 is no longer tied"):
        sparsifier.finalize()


@pytest.mark.parametrize("old_style", [nn.utils.weight_norm, nn.utils.spectral_norm])
def test_weights_computed_by_hooks_stay_dense(old_style: Any) -> None:
    with pytest.warns(FutureWarning) if old_style is nn.utils.weight_norm else pytest.MonkeyPatch.context():
        model = nn.Sequential(old_style(nn.Linear(4, 4)), nn.Linear(4, 4))
    sparsifier = fk.Sparsifier(model, sparsity=0.5, total_steps=4)
    assert [(s.name, s.reason) for s in sparsifier.skipped] == [
        ("0", "Linear: its weight is not a Parameter (weight_norm, spectral_norm, prune)")
    ]


def test_finalize_keeps_its_promise_whatever_came_last() -> None:
    model, x = nets.conv_net(), nets.images()
    sparsifier = fk.Sparsifier(model, sparsity=0.9, total_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for _ in range(4):
        model(x).square().mean().backward()
        sparsifier.step()  # before the optimizer: the threshold is a step old
        optimizer.step()
    sparsifier.finalize()
    weights = nets.prunable(model)
    zeros = sum(int((w == 0).sum()) for w in weights)
    assert zeros == math.floor((sum(w.numel() for w in weights) - 1) * 0.9) + 1


def test_assigned_state_is_followed() -> None:
    with torch.device("meta"):
        model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5))
    model.load_state_dict(nets.conv_net().state_dict(), assign=True)
    sparsifier.refresh(model)
    assert model(nets.images()).shape == (8, 10)
    assert sparsifier.report().zeros == (sparsifier.report().numel - 1) // 2 + 1


def test_a_copied_sparsifier_steps_with_its_copied_model() -> None:
    import copy

    model = nets.conv_net()
    pair = model, fk.Sparsifier(model, sparsity=0.5, total_steps=4)
    twin, sparsifier = copy.deepcopy(pair)
    twin(nets.images()).sum().backward()
    sparsifier.step()
    assert sparsifier.threshold.item() > 0
    assert pair[1].threshold.item() == 0


def test_recurrent_layers_see_replaced_parameters() -> None:
    layer, other = nn.LSTM(4, 6), nn.LSTM(4, 6)
    sparsifier = fk.Sparsifier(layer, schedule=fk.ConstantSchedule(0.6))
    layer.load_state_dict(other.state_dict(), assign=True)
    sparsifier.refresh(layer)
    x = torch.randn(3, 2, 4)
    y = layer(x)[0]
    sparsifier.finalize()
    torch.testing.assert_close(y, layer(x)[0])


def test_threads_do_not_share_what_they_read() -> None:
    layer = nn.MultiheadAttention(8, 2)
    fk.Sparsifier(layer, schedule=fk.ConstantSchedule(0.5))
    x = torch.randn(4, 2, 8)
    stop = threading.Event()

    def evaluate() -> None:
        while not stop.is_set():
            with torch.no_grad():
                layer(x, x, x)

    thread = threading.Thread(target=evaluate)
    thread.start()
    try:
        for _ in range(100):
            layer.zero_grad()
            layer(x, x, x)[0].sum().backward()
            assert layer._parameters["in_proj_weight"].grad is not None
    finally:
        stop.set()
        thread.join()


def test_attach_refuses_what_would_count_wrongly() -> None:
    model = nn.Linear(4, 4)
    sparsifier = fk.Sparsifier(model, sparsity=0.5, total_steps=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"optimizer must be a torch.optim.Optimizer, got FeatherLinear"):
        sparsifier.attach(model)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must hold a prunable weight"):
        sparsifier.attach(torch.optim.SGD([model.bias], lr=0.1))
    handle = sparsifier.attach(optimizer)
    with pytest.raises(RuntimeError, match="attached already"):
        sparsifier.attach(optimizer)
    handle.remove()
    sparsifier.attach(optimizer)


def test_resume_keeps_a_changing_grad_scale() -> None:
    def start() -> tuple[nn.Module, fk.Sparsifier]:
        torch.manual_seed(0)
        model = nn.Linear(8, 8)
        return model, fk.Sparsifier(model, sparsity=0.9, total_steps=20, grad_scale=lambda sparsity: 1 - sparsity)

    model, sparsifier = start()
    model(torch.randn(2, 8)).sum().backward()
    for _ in range(5):
        sparsifier.step()
    resumed, other = start()
    other.load_state_dict(sparsifier.state_dict())
    scales = [m.feather.thresholds["weight"].grad_scale for m in (model, resumed)]
    assert scales[0].equal(scales[1])


def test_data_parallel_and_direct_construction_are_refused() -> None:
    with pytest.raises(TypeError, match="Sparsifier makes it from the dense layer"):
        fk.nn.FeatherLinear(3, 3)
    model = nn.Linear(3, 3)
    fk.Sparsifier(model, sparsity=0.5, total_steps=4)
    with pytest.raises(RuntimeError, match="use DistributedDataParallel"):
        model._replicate_for_data_parallel()
