"""capturable=True keeps step, ranks and thresholds on the device, without a host read; a GPU captures it for real."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import feather_kernels as fk
from feather_kernels.sparsify.device_schedule import DeviceSchedule
from feather_kernels.sparsify.overrides import Override
from feather_kernels.sparsify.policies import Policy
from tests.support import nets
from tests.support.no_host_read import NoHostRead

POLICIES: dict[str, dict[str, Any]] = {
    "global": {},
    "layer": {"scope": "layer"},
    "erk": {"scope": "erk"},
    "floor-l2": {"min_density": 0.05, "score_scale": "l2"},
    "fan": {"score_scale": "fan"},
    "overrides": {"overrides": {"0": {"sparsity": 0.3, "grad_scale": 0.25}, "8": {"min_density": 0.5}}},
    "grad_scale": {"grad_scale": lambda s: 1 - s},
}


def tied_net() -> nn.Sequential:
    model = nets.conv_net()
    model.append(nn.Linear(10, 64)).append(nn.Linear(64, 10))
    model[9].weight = model[7].weight
    return model


def thresholds(sparsifier: fk.Sparsifier) -> Tensor:
    return torch.stack([use.binding.value for weight in sparsifier.weights for use in weight.uses])


def grad_scales(sparsifier: fk.Sparsifier) -> list[float | None]:
    scales = [use.binding.grad_scale for weight in sparsifier.weights for use in weight.uses]
    return [None if scale is None else scale.item() for scale in scales]


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> None:
    optimizer.zero_grad()
    F.cross_entropy(model(x), y).backward()
    optimizer.step()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_whole_training_step_reads_nothing_on_the_host(policy: str) -> None:
    model = tied_net()
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=6, capturable=True, **POLICIES[policy])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    x, y = nets.images(), torch.arange(8)
    with fk.use_backend("reference"), NoHostRead() as mode:  # the C++ backend reads memory, not through torch
        for _ in range(5):
            train_step(model, optimizer, x, y)
            sparsifier.step()
    assert {"index_add_", "index_select"} <= mode.ops
    assert sparsifier.step_count == 5


@pytest.mark.parametrize("policy", POLICIES)
def test_same_thresholds_as_without(policy: str) -> None:
    x, y = nets.images(), torch.arange(8)
    runs = []
    for capturable in (False, True):
        model = tied_net()
        sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=12, capturable=capturable, **POLICIES[policy])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        seen = [(thresholds(sparsifier), grad_scales(sparsifier), sparsifier.sparsity)]
        for _ in range(15):  # the ramp ends at 6, the planned run at 12
            train_step(model, optimizer, x, y)
            sparsifier.step()
            seen.append((thresholds(sparsifier), grad_scales(sparsifier), sparsifier.sparsity))
        report = sparsifier.report()
        sparsifier.finalize()
        runs.append((seen, report, [p.detach() for p in model.parameters()]))
    (plain, plain_report, plain_weights), (captured, captured_report, captured_weights) = runs
    for (t, scale, s), (other_t, other_scale, other_s) in zip(plain, captured, strict=True):
        assert t.equal(other_t)
        assert (scale, s) == (other_scale, other_s)
    assert plain_report == captured_report
    assert all(a.equal(b) for a, b in zip(plain_weights, captured_weights, strict=True))


SHAPES = [(64, 3, 7, 7), (512, 512, 3, 3), (2048, 512, 1, 1), (1000, 2048), (10, 64), (0, 4), (7,), ()]
OWN: dict[str, list[Override]] = {
    "no override": [Override()] * len(SHAPES),
    "own sparsities": [*[Override()] * 3, Override(sparsity=0.3), Override(sparsity=0.0), *[Override()] * 3],
    "own floors": [Override(min_density=0.01), *[Override()] * 6, Override(min_density=0.0)],
}


@pytest.mark.parametrize("own", OWN)
@pytest.mark.parametrize("min_density", [0.0, 0.001])
@pytest.mark.parametrize("scope", ["global", "layer", "erk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_positions_have_the_bits_of_the_host(scope: str, min_density: float, own: str, dtype: torch.dtype) -> None:
    shapes = SHAPES if min_density == 0 and own != "own floors" else SHAPES[:5]
    weights: Any = [SimpleNamespace(name=str(s), parameter=torch.empty(s, device="meta")) for s in shapes]
    wanted = [0.0, 0.98, 1e-9, 0.5, *torch.rand(400, generator=torch.Generator().manual_seed(0)).mul(0.98).tolist()]
    policy = Policy(weights, scope, min_density, "none", OWN[own][: len(shapes)], 0.98)
    schedule = fk.LambdaSchedule(lambda step: wanted[step], final_sparsity=0.98)
    on_device = DeviceSchedule(policy, schedule, len(wanted) - 1, lambda s: s / 3, torch.empty(1, dtype=dtype))
    for sparsity in wanted:
        ranks, fractions = on_device.positions()
        host = policy.positions(sparsity)
        assert (ranks.dtype, fractions.dtype) == (torch.int64, dtype)
        assert ranks.expand(len(host.ranks)).tolist() == host.ranks, sparsity
        assert fractions.equal(torch.tensor(host.fractions, dtype=dtype)), sparsity
        assert on_device.grad_scale().equal(torch.tensor(sparsity / 3, dtype=dtype))
        on_device.advance()


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ({}, 1),
        ({"scope": "layer", "min_density": 0.01}, 1),
        ({"scope": "erk", "grad_scale": 0.5}, 1),
        ({"scope": "erk", "grad_scale": lambda s: 1 - s, "overrides": {"0": {"sparsity": 0.3}}}, 3),
        ({"schedule": fk.ConstantSchedule(0.8)}, 0),
    ],
)
def test_the_tables_take_8_bytes_a_step_of_the_ramp(options: dict[str, Any], columns: int) -> None:
    ramp, layers = 1000, 5
    options = {"sparsity": 0.8, "total_steps": 2 * ramp, **options} if "schedule" not in options else options
    sparsifier = fk.Sparsifier(nets.conv_net(), capturable=True, **options)
    tensors = [t for t in vars(sparsifier._position.device_schedule).values() if isinstance(t, Tensor)]
    total = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    assert columns * 8 * ramp < total <= columns * 8 * (ramp + 1) + 3 * 8 * (layers + 1)


@pytest.mark.parametrize(("saving", "loading"), [(True, True), (True, False), (False, True)])
@pytest.mark.parametrize("policy", ["global", "layer", "grad_scale", "overrides"])
def test_state_resumes_bit_for_bit(policy: str, saving: bool, loading: bool) -> None:
    def start(capturable: bool) -> tuple[nn.Module, fk.Sparsifier, torch.optim.Optimizer]:
        model = nets.conv_net()
        sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=12, capturable=capturable, **POLICIES[policy])
        return model, sparsifier, torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

    def train(parts: tuple[nn.Module, fk.Sparsifier, torch.optim.Optimizer], steps: int) -> None:
        for _ in range(steps):
            train_step(parts[0], parts[2], nets.images(), torch.arange(8))
            parts[1].step()

    run = start(saving)
    train(run, 4)
    resumed = start(loading)
    for part, other in zip(run, resumed, strict=True):
        other.load_state_dict(copy.deepcopy(part.state_dict()))
    assert resumed[1].step_count == 4
    assert thresholds(resumed[1]).equal(thresholds(run[1]))
    assert grad_scales(resumed[1]) == grad_scales(run[1])
    train(run, 5)
    train(resumed, 5)
    assert thresholds(resumed[1]).equal(thresholds(run[1]))
    assert all(a.equal(b) for a, b in zip(run[0].parameters(), resumed[0].parameters(), strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": lambda weights, s: weights[0].max()}, "capturable=True needs a scope by name"),
        ({"grad_scale": lambda s: s - 1}, "grad_scale must be a finite number of at least 0"),
        ({"min_density": 0.5}, "min_density must leave"),
    ],
)
def test_what_cannot_be_captured_is_refused(options: dict[str, Any], message: str) -> None:
    model = nets.conv_net()
    with pytest.raises(ValueError, match=message):
        fk.Sparsifier(model, sparsity=0.8, total_steps=6, capturable=True, **options)
    assert type(model[0]) is nn.Conv2d


def test_schedule_of_unknown_length_is_refused() -> None:
    schedule = fk.LambdaSchedule(lambda step: min(0.5, step / 10), final_sparsity=0.5)
    with pytest.raises(ValueError, match="total_steps must be given with capturable=True and a schedule without"):
        fk.Sparsifier(nets.conv_net(), schedule=schedule, capturable=True)
    model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, schedule=schedule, total_steps=10, capturable=True)
    model(nets.images())
    for step in range(8):
        assert sparsifier.threshold.equal(
            fk.functional.magnitude_threshold(nets.prunable(model), step / 10 * (step < 5) + 0.5 * (step >= 5))
        )
        sparsifier.step()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", POLICIES)
def test_cuda_graph_replays_the_training_step(policy: str) -> None:
    model = tied_net().cuda()
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=20, capturable=True, **POLICIES[policy])
    optimizer = torch.optim.AdamW(model.parameters(), capturable=True)
    x, y = nets.images().cuda(), torch.arange(8, device="cuda")

    def step() -> None:
        train_step(model, optimizer, x, y)
        sparsifier.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    assert sparsifier.step_count == 3, "capturing runs nothing"
    plain = fk.Sparsifier(tied_net().cuda(), sparsity=0.8, total_steps=20, **POLICIES[policy])
    for count in range(4, 16):
        graph.replay()
        assert sparsifier.step_count == count
        plain.model.load_state_dict(model.state_dict())
        plain.load_state_dict({**plain.state_dict(), "step": count})
        plain.refresh(plain.model)
        assert thresholds(sparsifier).equal(thresholds(plain))
        assert grad_scales(sparsifier) == grad_scales(plain)
