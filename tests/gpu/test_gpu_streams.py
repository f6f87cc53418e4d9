"""On a real GPU: ops in CUDA graphs, on two streams, on a second device, and without memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

import feather_kernels as fk
from feather_kernels.backends import cuda
from feather_kernels.backends.registry import registry
from tests.conftest import BackendUnderTest
from tests.gpu.gpu_device import GPU, NAMES, gpu_backend, on_a_gpu
from tests.support.oracle import same_bits

ops = torch.ops.feather_kernels

WEIGHTS = 20_011


class Step:
    """Every op of a training step on tensors that stay where they are; ``results`` holds what they gave last."""

    def __init__(self, device: torch.device, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.weights = [torch.randn(n, generator=generator).to(device) for n in (WEIGHTS, 333)]
        self.gradient = torch.ones(WEIGHTS, device=device)
        self.given_gradient = torch.randn(WEIGHTS, generator=generator).to(device)
        self.t = torch.tensor(0.3, device=device)
        self.scale = torch.tensor(0.5, device=device)
        self.rank = torch.tensor([9000], device=device)
        self.hint = torch.zeros(1, 2, device=device)
        self.results: list[Tensor] = []

    def run(self) -> None:
        self.gradient.copy_(self.given_gradient)
        self.gradient.copy_(ops.scale_pruned_grad(self.gradient, self.weights[0], self.t, self.scale))
        selected = ops.magnitude_select(self.weights, [0, 0], self.rank, hint=self.hint)
        self.results = [
            *(ops.threshold(self.weights[0], self.t, p) for p in (1.0, 2.0, 3.0, math.inf)),
            ops.threshold(self.weights[0], self.t, 3.0, out_dtype=torch.bfloat16),
            ops.count_pruned(self.weights, [self.t, self.t]),
            selected,
            self.gradient,
        ]

    def change(self, index: int) -> None:
        """Other weights, threshold, rank and gradient scale in place; the hint is the last selection."""
        self.hint.copy_(self.results[-2])
        self.weights[0].mul_(1.01)
        self.t.fill_((0.5, -1.0, math.nan, 1.7)[index % 4])
        self.scale.fill_((0.25, 0.0, 1.0)[index % 3])
        self.rank.fill_((9100, 0, WEIGHTS + 332)[index % 3])

    def kept(self) -> list[Tensor]:
        return [result.clone() for result in self.results]


def replays_as_run(step: Step, replay: Callable[[], None]) -> None:
    """Whether ``replay`` fills ``step.results`` with what the ops give for changed inputs."""
    results = step.results
    for index in range(6):
        step.results = results
        step.change(index)
        replay()
        replayed = step.kept()
        step.run()
        assert all(same_bits(*pair) for pair in zip(replayed, step.results, strict=True)), f"change {index}"


def test_replaying_is_compared_with_running(backend: BackendUnderTest) -> None:
    step = Step(backend.device)
    step.run()
    results = step.results

    def replay() -> None:
        step.run()
        for result, new in zip(results, step.results, strict=True):
            result.copy_(new)
        step.results = results

    replays_as_run(step, replay)
    with pytest.raises(AssertionError, match="change 0"):
        replays_as_run(step, lambda: None)


@on_a_gpu
@pytest.mark.parametrize("name", NAMES)
def test_a_captured_graph_follows_changes_in_place(name: str) -> None:
    with gpu_backend(name):
        step, stream = Step(GPU), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step.run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step.run()
        graph.replay()
        replays_as_run(step, graph.replay)


@on_a_gpu
@pytest.mark.parametrize("name", NAMES)
def test_two_streams_at_a_time(name: str) -> None:
    with gpu_backend(name):
        expected = []
        for seed in (0, 1):
            step = Step(GPU, seed)
            step.run()
            expected.append(step.kept())
        steps, streams = [Step(GPU, 0), Step(GPU, 1)], [torch.cuda.Stream(), torch.cuda.Stream()]
        torch.cuda.synchronize()
        for _ in range(20):
            for step, stream in zip(steps, streams, strict=True):
                with torch.cuda.stream(stream):
                    step.run()
        torch.cuda.synchronize()
        for step, wanted in zip(steps, expected, strict=True):
            assert all(same_bits(*pair) for pair in zip(step.results, wanted, strict=True))


@on_a_gpu
@pytest.mark.parametrize("name", NAMES)
def test_tensors_on_a_device_that_is_not_the_current_one(name: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    second = torch.device("cuda", 1)
    with torch.cuda.device(0), gpu_backend(name):
        on_first = Step(GPU)
        on_first.run()
        wanted = [result.cpu() for result in on_first.results]
        with gpu_backend(name, second):
            on_second = Step(second)
            on_second.run()
        assert all(result.device == second for result in on_second.results)
        assert all(same_bits(*pair) for pair in zip(on_second.results, wanted, strict=True))
        assert torch.cuda.current_device() == 0


@pytest.fixture
def forgotten() -> Iterator[None]:
    """What was probed is forgotten before the test and after it."""
    registry.reset()
    yield
    registry.reset()


@pytest.mark.parametrize("name", NAMES)
def test_a_probe_without_memory_raises(name: str, forgotten: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*arguments: object, **options: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    if name == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setattr(cuda, "load_module", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch, "tensor", no_memory)
    with pytest.raises(torch.OutOfMemoryError), fk.use_backend(name):
        registry.backend_for(GPU)
    assert not registry.is_probed(name, GPU)


@on_a_gpu
@pytest.mark.parametrize("name", NAMES)
def test_no_memory_is_not_remembered_as_no_backend(name: str, forgotten: None) -> None:
    with gpu_backend(name):
        pass
    registry.reset()
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    held: list[Tensor] = []
    torch.cuda.set_per_process_memory_fraction(1e-6)
    try:
        with pytest.raises(torch.OutOfMemoryError):
            held.extend(torch.empty(1, device=GPU) for _ in range(100_000))  # until not even the smallest has room
        with pytest.raises(torch.OutOfMemoryError), fk.use_backend(name):
            registry.backend_for(GPU)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        held.clear()
    assert registry.availability(GPU)[name] is None
