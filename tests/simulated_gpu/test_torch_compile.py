"""torch.compile over the ops gives eager's bits in one graph and compiles nothing twice.

Runs on the backend under test. On the PTX executor the compiled graphs call the Triton kernels, whose PTX it executes.
"""

from __future__ import annotations

import math
import re
import sys
import types
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._inductor import config as inductor_config

import feather_kernels as fk
from feather_kernels import cli
from feather_kernels.backends.registry import registry
from tests.conftest import PTX_ARCHITECTURE, BackendUnderTest, ptx_executor

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
COMPILERS = ("aot_eager", "inductor")
STEPS = 100
on_executor = pytest.mark.skipif(not PTX_ARCHITECTURE, reason="counts what Triton compiles: needs the PTX executor")


def small_net(seed: int = 0) -> nn.Sequential:
    """(N, 2, 6, 6) -> (N, 3); no sum over more than two terms depends on how a compiler orders it."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, bias=False), nn.ReLU(), nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3)
    )


def images(step: int = 0) -> torch.Tensor:
    return torch.randn(2, 2, 6, 6, generator=torch.Generator().manual_seed(step))


class Training:
    """A model with its optimizer and sparsifier: both thresholds and gradient scales change at every step."""

    def __init__(
        self, steps: int, compiler: str | None = None, dtype: torch.dtype = torch.float32, **options: Any
    ) -> None:
        self.model = small_net().to(dtype)
        options = {"grad_scale": lambda sparsity: 1 - sparsity / 2, **options}
        self.sparsifier = fk.Sparsifier(self.model, sparsity=0.8, total_steps=steps, **options)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.05)
        self.counter = CompileCounterWithBackend(compiler) if compiler else None
        self.run: Any = torch.compile(self.model, fullgraph=True, backend=self.counter) if compiler else self.model

    def step(self, step: int) -> list[torch.Tensor]:
        """Outputs, gradients and thresholds of a step."""
        self.optimizer.zero_grad()
        y = self.run(images(step).to(self.model[0].weight.dtype))
        y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1000 + step)).to(y.dtype))
        seen = [y.detach().clone(), *(p.grad.clone() for p in self.model.parameters() if p.grad is not None)]
        self.optimizer.step()
        self.sparsifier.step()
        return [*seen, *(use.binding.value.clone() for w in self.sparsifier.weights for use in w.uses)]


@pytest.fixture(autouse=True)
def fresh_compiler() -> None:
    torch._dynamo.reset()


@pytest.mark.parametrize("out_dtype", [None, torch.bfloat16], ids=str)
@pytest.mark.parametrize("compiler", COMPILERS)
def test_threshold_has_the_bits_of_eager(
    backend: BackendUnderTest, compiler: str, out_dtype: torch.dtype | None
) -> None:
    def sparse(w: torch.Tensor, t: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return fk.functional.threshold(w, t, grad_scale=scale, out_dtype=out_dtype)

    counter = CompileCounterWithBackend(compiler)
    compiled = torch.compile(sparse, fullgraph=True, backend=counter)
    w = torch.randn(40, 9).requires_grad_()
    t, scale = torch.zeros(()), torch.ones(())
    for step in range(5):
        t.fill_(step * 0.3)
        scale.fill_(1 - step * 0.2)
        g = torch.randn(40, 9).to(out_dtype or w.dtype)
        results = []
        for function in (compiled, sparse):
            y = function(w, t, scale)
            (gradient,) = torch.autograd.grad(y, w, g)
            results.append((y, gradient))
        (y, gradient), (eager_y, eager_gradient) = results
        assert y.dtype == g.dtype
        assert torch.equal(y, eager_y)
        assert torch.equal(gradient, eager_gradient)
        assert bool((y == 0).any()) == (step > 0)
    assert counter.frame_count == 1


@pytest.mark.parametrize("autocast", [False, True], ids=["float32", "autocast"])
@pytest.mark.parametrize("compiler", COMPILERS)
@inductor_config.patch(emulate_precision_casts=True)  # else fused bfloat16 sums round less often, in dense models too
def test_training_has_the_bits_of_eager(backend: BackendUnderTest, compiler: str, autocast: bool) -> None:
    if autocast and compiler == "inductor" and TORCH < (2, 12):
        pytest.skip("inductor of torch 2.11 leaves out roundings of bias gradients under autocast, in dense models too")
    eager_training, compiled_training = Training(4), Training(4, compiler)
    for step in range(4):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            results = [training.step(step) for training in (eager_training, compiled_training)]
        assert results[0][0].dtype == (torch.bfloat16 if autocast else torch.float32)
        for a, b in zip(*results, strict=True):
            assert torch.equal(a, b)
    assert compiled_training.counter is not None
    assert compiled_training.counter.frame_count == 1
    assert eager_training.sparsifier.sparsity == pytest.approx(0.8)


@pytest.fixture
def launching(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], Counter[str]]]:
    """A backend that takes every launch through Triton's JIT, does not execute it, and has the reference's values.

    What Triton compiles depends on the arguments of a launch alone; so a hundred steps take seconds. Yields a function
    that counts what was compiled so far, by kernel.
    """
    from feather_kernels.backends import reference, triton

    def launched(name: str) -> Callable[..., None]:
        def run(*arguments: Any) -> None:
            getattr(triton, name)(*arguments)
            getattr(reference, name)(*arguments)

        return run

    module = types.ModuleType("launching_backend")
    module.__dict__.update({name: launched(name) for name in triton.__all__ if name != "probe"})
    module.__dict__.update(probe=lambda device: None, POWERS=triton.POWERS)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(registry.modules, "launching", module.__name__)
    with ptx_executor(execute=False) as driver, fk.use_backend("launching"):
        yield lambda: Counter(kernel.name for kernel in driver.loaded)
    registry.reset()


@on_executor
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("compiler", [None, *COMPILERS])
def test_nothing_is_compiled_again_over_the_schedule(launching: Any, compiler: str | None, scope: str) -> None:
    training, thresholds = Training(STEPS, compiler, scope=scope), set()
    training.step(0)
    first = launching()
    assert {"threshold_kernel", "histogram_kernel"} <= set(first)
    assert ("scale_kernel" in first) == (compiler is None), "compilers fuse torch's own ops instead"
    for step in range(1, STEPS):
        thresholds.add(float(training.step(step)[-1]))
    assert len(thresholds) > STEPS // 3, "the threshold moved along the schedule"
    assert launching() == first
    if training.counter:
        assert training.counter.frame_count == 1


@on_executor
def test_sizes_and_places_are_compiled_once(launching: Any) -> None:
    """Weights of any size and thresholds at any place of their vector: Triton would compile apart what 16 divides."""
    thresholds = torch.full((8,), 0.1)
    for size in (1, 2, 5, 15, 16, 17, 48, 64, 100, 1000, 1024, 4096, 4097):
        w = torch.randn(size)
        for t in thresholds:
            torch.ops.feather_kernels.threshold(w, t, 3.0)
            torch.ops.feather_kernels.scale_pruned_grad(w, w, t, thresholds[0])
        torch.ops.feather_kernels.count_pruned([w] * 3, list(thresholds[:3]))
    assert launching() == {"threshold_kernel": 1, "scale_kernel": 1, "count_kernel": 1}


@on_executor
@pytest.mark.parametrize("capturable", [False, True], ids=["plain", "capturable"])
@pytest.mark.parametrize("scope", ["global", "layer"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_after_warmup_training_compiles_nothing(
    launching: Any, dtype: torch.dtype, scope: str, capturable: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    name = str(dtype).removeprefix("torch.")
    assert cli.main(["warmup", "--device", "cpu", "--dtype", name]) == 0
    *lines, total = capsys.readouterr().out.splitlines()
    kernels = re.findall(
        rf"^cpu (\w+) {name}: (\d+) kernels compiled, (\d+) from Triton's cache", "\n".join(lines), re.M
    )
    assert [op for op, _, _ in kernels] == ["threshold", "scale_pruned_grad", "magnitude_select", "count_pruned"]
    assert all(int(compiled) + int(cached) > 0 for _, compiled, cached in kernels)
    assert total.startswith(f"{sum(int(compiled) for _, compiled, _ in kernels)} kernels compiled in ")
    warmed = launching()
    for policy in ({}, {"min_density": 0.1, "score_scale": "l2"}):
        training = Training(8, dtype=dtype, scope=scope, capturable=capturable, **policy)
        training.step(0)
        for low in (torch.bfloat16, torch.float16) if dtype == torch.float32 else ():
            with torch.autocast("cpu", dtype=low):
                assert training.step(1)[0].dtype == low
        training.step(2)
        training.sparsifier.report()
    for power in (1.0, 2.0, math.inf):
        fk.functional.threshold(torch.randn(7, 5).to(dtype), 0.1, power)
        fk.functional.threshold(torch.randn(8, 5).to(dtype)[1:], 0.1, power)
    misaligned, scalar = torch.randn(8).to(dtype)[1:], torch.tensor(0.1)
    torch.ops.feather_kernels.threshold.out(misaligned, scalar, 3.0, out=misaligned)
    for gradient in (misaligned, torch.randn(7).to(dtype)):
        torch.ops.feather_kernels.scale_pruned_grad(gradient, misaligned, scalar, scalar)
    fk.functional.magnitude_threshold([torch.randn(7, 5).to(dtype), torch.randn(64).to(dtype)], 0.5)
    many, rank = torch.randn(1 << 20).to(dtype), torch.tensor([1 << 10])
    for weights in ([many] * 3, [many[: 1 << 13]], [many[: 1 << 15]] * 3):
        torch.ops.feather_kernels.magnitude_select(weights, [0] * len(weights), rank, hint=torch.ones(1, 2))
    assert launching() == warmed


def placed(size: int, dtype: torch.dtype, aligned: bool) -> torch.Tensor:
    """Ones at an address that 16 divides, or does not."""
    made = torch.ones(size + 1, dtype=dtype)
    assert made.data_ptr() % 16 == 0
    return made[:-1] if aligned else made[1:]


@on_executor
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_after_warmup_no_size_or_address_compiles(launching: Any, dtype: torch.dtype) -> None:
    """All operands at addresses that 16 divides or does not, sizes that it divides or does not, and 1."""
    assert cli.main(["warmup", "--device", "cpu", "--dtype", str(dtype).removeprefix("torch.")]) == 0
    warmed, narrow = launching(), (dtype, *((torch.bfloat16, torch.float16) if dtype == torch.float32 else ()))
    scalars = [placed(1, torch.float32, aligned)[0] for aligned in (True, False)]
    for size, low, *aligned in product((1, 7, 16, 1023, 1024, 4097), narrow, *[(True, False)] * 3):
        w, g, out = (placed(size, kind, at) for kind, at in zip((dtype, low, low), aligned, strict=True))
        for t in scalars:
            for power in (1.0, 2.0, 3.0, math.inf):
                torch.ops.feather_kernels.threshold.out(w, t, power, out=out)
            torch.ops.feather_kernels.scale_pruned_grad(g, w, t, scalars[0])
    for size, at, place in product((1, 7, 16, 1023, 1024, 4097), (True, False), (True, False)):
        weights = [placed(size, dtype, at), placed(33, dtype, not at)]
        rank = placed(1, torch.int64, place)
        scales, hint = placed(2, torch.float32, place), placed(2, torch.float32, place).view(1, 2)
        for options in ({}, {"scales": scales}, {"caps": placed(2, torch.int64, place)}, {"hint": hint}):
            torch.ops.feather_kernels.magnitude_select(weights, [0, 0], rank, **options)
        torch.ops.feather_kernels.count_pruned(weights, list(scales))
    assert launching() == warmed


@pytest.mark.parametrize("compiler", COMPILERS)
def test_backward_recomputes(backend: BackendUnderTest, compiler: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """P(w) is made anew in the backward graph, not hoisted out of it and not kept from the forward."""
    calls: Counter[str] = Counter()

    class Counting:
        def __getattr__(self, name: str) -> Any:
            calls[name] += 1
            return getattr(registry.backend_for(backend.device), name)

    monkeypatch.setattr(registry, "backend_for_threshold", lambda device, power: Counting())
    training = Training(4, compiler, recompute=True)
    training.step(0)
    calls.clear()
    y = training.run(images())
    assert calls == {"threshold": 3}
    y.sum().backward()
    assert calls["threshold"] == 5, "of both linear layers; the convolution's input needs no gradient"
