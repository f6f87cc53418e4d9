"""Training in the CUDA graphs of torch.compile, and what that asks of the ops: they keep no tensor."""

from __future__ import annotations

import contextlib
import gc

import pytest
import torch
from torch import nn

import feather_kernels as fk
from tests.gpu.gpu_device import GPU, NAMES, gpu_backend, on_a_gpu
from tests.support.uploads import count_uploads


@pytest.mark.parametrize("power", [1.0, 2.0, 2.5, 3.0, float("inf")])
def test_elementwise_ops_keep_no_tensor(power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the warm-up of a graph it would be allocated in the graph's own memory."""
    uploads = count_uploads(monkeypatch)
    w, t = torch.randn(500), torch.tensor(0.5)
    ops = torch.ops.feather_kernels
    before = {id(thing) for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)}
    ops.threshold(w, t, power)
    ops.scale_pruned_grad(w, w, t, t)
    gc.collect()
    assert {id(thing) for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)} <= before
    assert uploads == []


def trained(device: torch.device, power: float, mode: str | None) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of 12 steps, thresholds behind them; compiled with ``mode``."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 10)).to(device)
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=12, power=power, grad_scale=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = model if mode is None else torch.compile(model, mode=mode, fullgraph=True)
    x, y = torch.randn(16, 32, device=device), torch.arange(16, device=device) % 10
    losses, thresholds = [], []
    for _ in range(12):
        loss = nn.functional.cross_entropy(run(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sparsifier.step()
        losses.append(loss.item())
        thresholds.append(sparsifier.threshold.clone())
    return losses, thresholds


@on_a_gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("power", [3.0, 2.5])
def test_training_under_reduce_overhead_is_training_in_eager(power: float, name: str) -> None:
    """With a power that has a kernel and one that takes the reference, in the CUDA graphs that torch.compile makes."""
    with contextlib.nullcontext() if power == 2.5 else gpu_backend(name):  # a named backend refuses other powers
        losses, thresholds = trained(GPU, power, None)
        compiled_losses, compiled_thresholds = trained(GPU, power, "reduce-overhead")
    assert compiled_losses == pytest.approx(losses, rel=1e-3)
    torch.testing.assert_close(torch.stack(compiled_thresholds), torch.stack(thresholds), rtol=1e-3, atol=1e-6)
    assert losses[-1] < losses[0]
