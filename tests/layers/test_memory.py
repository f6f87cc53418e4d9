"""Nothing of the size of the weights lives between forward and backward, in eager and in compiled models."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import nn

import feather_kernels as fk
from benchmarks.live_bytes import LiveBytes
from feather_kernels.backends import reference
from feather_kernels.backends.registry import registry

WIDTH = 256


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for _ in range(6):
        layers += [nn.Linear(WIDTH, WIDTH), nn.ReLU()]
    return nn.Sequential(*layers, nn.Unflatten(1, (64, 2, 2)), nn.Conv2d(64, 96, 3, padding=1), nn.Flatten())


def saved_bytes(model: nn.Module, x: torch.Tensor) -> tuple[int, int]:
    """Bytes of distinct tensors saved for backward that are not parameters, and the weights' bytes."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in parameters:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(x).sum()
    return sum(saved.values()), sum(p.numel() * p.element_size() for p in model.parameters() if p.dim() > 1)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_eager_saves_what_the_dense_model_saves(scale: float) -> None:
    model, x = network(), torch.randn(4, WIDTH, requires_grad=True)
    dense, weights = saved_bytes(model, x)
    fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5), grad_scale=scale, recompute=True)
    sparse, _ = saved_bytes(model, x)
    assert sparse <= dense + 0.1 / 4 * weights
    keeping = network()
    fk.Sparsifier(keeping, schedule=fk.ConstantSchedule(0.5), grad_scale=scale, recompute=False)
    kept, _ = saved_bytes(keeping, x)
    assert kept >= dense + weights, "recompute=False holds a copy of every weight: the measure sees it"


def peak_of_a_step(model: nn.Module, x: torch.Tensor, compiled: Any = None) -> int:
    run = compiled or model
    run(x).sum().backward()
    model.zero_grad(set_to_none=True)
    gc.collect()
    with LiveBytes() as live:
        run(x).sum().backward()
    model.zero_grad(set_to_none=True)
    return live.peak


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_peak_of_an_eager_step(scale: float) -> None:
    x = torch.randn(4, WIDTH)
    dense = peak_of_a_step(network(), x)
    model = network()
    fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5), grad_scale=scale, recompute=True)
    sparse = peak_of_a_step(model, x)
    numels = [p.numel() for p in model.parameters() if p.dim() > 1]
    assert sparse <= dense + 0.1 * sum(numels) + 4 * max(numels) + 4096


def copies_saved(compiled: Any, model: nn.Module, x: torch.Tensor) -> tuple[list[tuple[int, ...]], torch.Tensor]:
    """Shapes of weights among the saved tensors that are not the parameters themselves, and the output."""
    parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() > 1}
    shapes |= {shape[::-1] for shape in shapes}
    copies: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) in shapes and tensor.untyped_storage().data_ptr() not in parameters:
            copies.append(tuple(tensor.shape))
        return tensor

    compiled(x).sum().backward()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        return copies, compiled(x)


@pytest.mark.parametrize("compiler", ["aot_eager_decomp_partition", "inductor"])
def test_compiled_backward_recomputes_and_saves_no_copy(compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Counting:
        """The reference, counting its calls of threshold."""

        def __getattr__(self, name: str) -> Any:
            if name == "threshold":
                calls.append(name)
            return getattr(reference, name)

    monkeypatch.setattr(registry, "backend_for_threshold", lambda device, power: Counting())
    model, x = network(), torch.randn(4, WIDTH, requires_grad=True)
    torch._dynamo.reset()
    # on a CPU inductor lays the weight of a convolution out anew, in a dense model too
    dense, _ = copies_saved(torch.compile(model, fullgraph=True, backend=compiler), model, x)
    fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5), grad_scale=0.5, recompute=True)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=compiler)
    copies, y = copies_saved(compiled, model, x)
    assert copies == dense
    assert len(calls) == 21, "7 layers, in forward, backward, forward"
    y.sum().backward()
    assert len(calls) == 28


def test_weight_changed_between_forward_and_backward_raises() -> None:
    model, x = network(), torch.randn(4, WIDTH)
    fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5), recompute=True)
    loss = model(x).sum()
    with torch.no_grad():
        model[2].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_peak_on_a_gpu() -> None:
    def peak(model: nn.Module) -> int:
        x = torch.randn(4, WIDTH, device="cuda")
        model(x).sum().backward()
        model.zero_grad(set_to_none=True)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        model(x).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    dense, model = peak(network().cuda()), network().cuda()
    fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5), grad_scale=0.5, recompute=True)
    numels = [p.numel() for p in model.parameters() if p.dim() > 1]
    assert peak(model) <= dense + 0.1 * sum(numels) + 4 * max(numels) + (2 << 20)
