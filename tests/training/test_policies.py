"""Scopes, floors, score scales, overrides and their reports, against sorting."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import feather_kernels as fk
from feather_kernels.sparsify.allocation import ErdosRenyiKernel
from feather_kernels.sparsify.policies import largest_below
from tests.support import nets
from tests.support.oracle import order_statistics, scores
from tests.support.recorded_operations import RecordedOperations


def constant(model: nn.Module, sparsity: float, **options: Any) -> fk.Sparsifier:
    return fk.Sparsifier(model, schedule=fk.ConstantSchedule(sparsity), **options)


def thresholds(sparsifier: fk.Sparsifier) -> list[Tensor]:
    return [weight.uses[0].binding.value for weight in sparsifier.weights]


def pruned(sparsifier: fk.Sparsifier) -> list[int]:
    pairs = zip(sparsifier.weights, thresholds(sparsifier), strict=True)
    return [int(((w.parameter.to(t.dtype).abs() <= t) & (t > 0)).sum()) for w, t in pairs]


def budget(count: int, sparsity: float) -> int:
    return math.floor((count - 1) * sparsity) + 1


def level_of(parts: list[Tensor], sparsity: float, caps: list[int] | None = None) -> Tensor:
    """The quantile by sorting; counts the elements of all parts, the capped ones too."""
    position = (sum(part.numel() for part in parts) - 1) * sparsity
    low, high = order_statistics(parts, math.floor(position), caps)
    value = low + (high - low) * torch.tensor(position - math.floor(position), dtype=low.dtype)
    return value if high > low and value < high else low


def uneven_net(seed: int = 0, dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Layers whose magnitudes differ by a factor of 30: a global threshold would empty the small ones."""
    model = nets.conv_net(seed).to(dtype)
    with torch.no_grad():
        for factor, weight in zip((1.0, 0.1, 0.3, 3.0, 1.0), nets.prunable(model), strict=True):
            weight.mul_(factor)
    return model


# ---------------------------------------------------------------------------------------------------- scopes


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.9, 0.995])
def test_layer_scope_prunes_every_layer_alike(sparsity: float) -> None:
    model = uneven_net()
    sparsifier = constant(model, sparsity, scope="layer")
    expected = [budget(w.numel(), sparsity) if sparsity else 0 for w in nets.prunable(model)]
    ties = [layer.ties for layer in sparsifier.report().layers]
    assert pruned(sparsifier) == [e + t for e, t in zip(expected, ties, strict=True)]
    for weight, t in zip(nets.prunable(model), thresholds(sparsifier), strict=True):
        assert t == (level_of([scores(weight)], sparsity) if sparsity else 0)


def test_layer_scope_counts_ties_per_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 4))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([1.0] * 15 + [2.0] * 5).reshape(5, 4))
        model[1].weight.copy_(torch.arange(1.0, 21.0).reshape(4, 5))
    report = constant(model, 0.5, scope="layer").report()
    assert [(layer.zeros, layer.ties) for layer in report.layers] == [(15, 5), (10, 0)]


def brute_force_erk(shapes: list[tuple[int, ...]], density: float) -> list[float]:
    """Bisection of the factor f of ``min(1, f sum/prod)``."""
    raw = np.array([sum(shape) / math.prod(shape) for shape in shapes])
    sizes = np.array([math.prod(shape) for shape in shapes])
    low, high = 0.0, 2 / raw.min()
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if (np.minimum(1, middle * raw) * sizes).sum() < density * sizes.sum() else (low, middle)
        )
    return list(np.minimum(1, low * raw))


@given(
    st.lists(st.lists(st.integers(1, 40), min_size=2, max_size=4).map(tuple), min_size=1, max_size=8),
    st.floats(0.01, 0.999),
)
def test_erk_allocation(shapes: list[tuple[int, ...]], sparsity: float) -> None:
    kernel = ErdosRenyiKernel(shapes)
    densities = 1 - np.array(kernel.sparsities(kernel.factor(sparsity)))
    sizes = np.array([math.prod(shape) for shape in shapes])
    assert densities == pytest.approx(brute_force_erk(shapes, 1 - sparsity), abs=1e-9)
    assert (densities * sizes).sum() == pytest.approx((1 - sparsity) * sizes.sum())
    assert kernel.sparsities(kernel.factor(0.0)) == [0.0] * len(shapes)


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.99])
def test_erk_scope(sparsity: float) -> None:
    model = nets.conv_net()
    sparsifier = constant(model, sparsity, scope="erk")
    shapes = [tuple(w.shape) for w in nets.prunable(model)]
    for shape, zeros in zip(shapes, pruned(sparsifier), strict=True):
        wanted = 1 - brute_force_erk(shapes, 1 - sparsity)[shapes.index(shape)]
        assert abs(zeros - wanted * math.prod(shape)) <= 1
    total = sum(map(math.prod, shapes))
    assert abs(sum(pruned(sparsifier)) - sparsity * total) <= len(shapes)


def test_erk_leaves_out_layers_with_a_sparsity_of_their_own() -> None:
    model = nets.conv_net()
    sparsifier = constant(model, 0.8, scope="erk", overrides={"6": {"sparsity": 0.0}})
    zeros = pruned(sparsifier)
    others = [w.numel() for w in nets.prunable(model) if w is not model[6].weight]
    assert zeros[2] == 0
    assert abs(sum(zeros) - 0.8 * sum(others)) <= len(others)


def test_callable_scope() -> None:
    model, seen = nets.conv_net(), []

    def halves(weights: list[Tensor], sparsity: float) -> Tensor:
        seen.append(sparsity)
        assert [id(w) for w in weights] == [id(w) for w in nets.prunable(model)]
        return torch.stack([w.abs().max() * sparsity for w in weights])

    sparsifier = constant(model, 0.5, scope=halves)
    for weight, t in zip(nets.prunable(model), thresholds(sparsifier), strict=True):
        assert t == weight.abs().max() * 0.5
    assert seen == [0.5]
    assert sparsifier.report().ties == 0
    one_for_all = constant(nets.conv_net(), 0.5, scope=lambda weights, s: torch.tensor(s, dtype=torch.float64))
    assert [t.item() for t in thresholds(one_for_all)] == [0.5] * 5


@pytest.mark.parametrize("returned", [0.5, torch.zeros(3), torch.zeros(5, 1), None, [torch.zeros(())]])
def test_callable_scope_with_a_wrong_return(returned: Any) -> None:
    model = nets.conv_net()
    with pytest.raises(ValueError, match=r"scope must return a tensor of shape \(\) or \(5,\), got"):
        constant(model, 0.5, scope=lambda weights, sparsity: returned)
    assert type(model[0]) is nn.Conv2d


# ------------------------------------------------------------------------------------- floors and score scales


def scale_of(weight: Tensor, score_scale: str) -> Tensor | None:
    if score_scale == "none":
        return None
    if score_scale == "fan":
        return torch.tensor(1 / math.sqrt(sum(weight.shape)))
    norm = torch.linalg.vector_norm(weight.detach())
    return 1 / norm if norm > 0 else torch.zeros(())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("score_scale", ["none", "l2", "fan"])
@pytest.mark.parametrize("min_density", [0.0, 0.004, 0.05, 0.2, 0.5])
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.75, 0.949])
def test_budget_and_floors_are_exact(sparsity: float, min_density: float, score_scale: str, dtype: torch.dtype) -> None:
    model = uneven_net(dtype=dtype)
    weights = nets.prunable(model)
    caps = [w.numel() - math.ceil(min_density * w.numel()) for w in weights]
    count = sum(w.numel() for w in weights)
    options = {"min_density": min_density, "score_scale": score_scale}
    if budget(count, sparsity) > sum(caps):
        with pytest.raises(ValueError, match="min_density must leave"):
            constant(model, sparsity, **options)
        return
    sparsifier = constant(model, sparsity, **options)
    if dtype == torch.float32:
        factors = [scale_of(w, score_scale) for w in weights]
        parts = [scores(w) if f is None else scores(w) * f for w, f in zip(weights, factors, strict=True)]
        level = level_of(parts, sparsity, caps)
        for part, cap, zeros in zip(parts, caps, pruned(sparsifier), strict=True):
            assert zeros == int((part.sort().values[:cap] <= level).sum()), "no ties in this net"
    report = sparsifier.report()
    for layer, cap, zeros in zip(report.layers, caps, pruned(sparsifier), strict=True):
        assert layer.zeros == zeros <= cap + layer.ties
        assert 0 <= layer.ties <= layer.zeros
    assert report.ties == report.zeros - budget(count, sparsity)
    sparsifier.finalize()
    assert sum(int((w == 0).sum()) for w in weights) == report.zeros


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_norms_of_all_weights_take_one_call_and_have_the_bits_of_vector_norm(dtype: torch.dtype) -> None:
    counts = []
    for length in (3, 30):
        model = nn.Sequential(*[nn.Linear(8, 6 + i % 3, bias=False) for i in range(length)]).to(dtype)
        policy = constant(model, 0.5, score_scale="l2")._policy
        weights = nets.prunable(model)
        with torch.no_grad(), RecordedOperations() as mode:
            scales = policy.scales(weights)
        counts.append(len(mode.names))
        assert mode.names.count("_foreach_norm") == 1
        wanted = [1 / torch.linalg.vector_norm(w.detach(), dtype=scales.dtype) for w in weights]
        assert scales.equal(torch.stack(wanted))
    assert counts[0] == counts[1]


def test_infeasible_floor_names_a_sparsity_that_can_be_reached() -> None:
    model = nets.conv_net()
    with pytest.raises(
        ValueError, match=r"min_density must leave .* sparsity 0\.\d+ can be reached, not 0\.9"
    ) as caught:
        constant(model, 0.9, min_density=0.1234)
    assert type(model[0]) is nn.Conv2d
    reachable = float(str(caught.value).split("sparsity ")[1].split()[0])
    zeros = sum(pruned(constant(model, reachable, min_density=0.1234)))
    assert 0 <= reachable * 4200 - zeros + 1 <= 2
    with pytest.raises(ValueError, match="min_density must leave"):
        constant(nets.conv_net(), reachable + 0.0003, min_density=0.1234)
    with pytest.raises(ValueError, match="min_density must leave"):  # at the end of the ramp, known at its beginning
        fk.Sparsifier(nets.conv_net(), sparsity=0.9, total_steps=10, min_density=0.2)


def test_ties_at_a_floor_are_reported_once() -> None:
    model = nn.Sequential(nn.Linear(5, 2, bias=False), nn.Linear(2, 5, bias=False))
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([2.0, 2, 2, 11, 12, 13, 14, 15, 16, 17]).reshape(2, 5))
        model[1].weight.copy_(torch.tensor([1.0, 1, 2, 2, 2, 6, 7, 8, 9, 10]).reshape(5, 2))
    report = constant(model, 0.16, min_density=0.7).report()  # each may lose 3, of 20 together 4
    assert [(layer.zeros, layer.ties) for layer in report.layers] == [(3, 1), (5, 3)]


def test_magnitudes_whose_scores_round_to_one_value_are_ties() -> None:
    ties = []
    for zeros in range(1, 31):
        model = nn.Linear(31, 1, bias=False)  # scores abs(w) / sqrt(32) are closer than float32 numbers there
        with torch.no_grad():
            model.weight.copy_((1.9 + torch.arange(31) // 2 * 2.0**-23).reshape(1, 31))
        report = constant(model, (zeros - 0.5) / 30, score_scale="fan").report()
        assert report.ties == report.zeros - zeros
        ties.append(report.ties)
    assert max(ties) == 3, "two magnitudes, each twice"


def test_a_layer_of_zeros_goes_first_under_l2() -> None:
    model = uneven_net()
    with torch.no_grad():
        model[3].weight.zero_()
    sparsifier = constant(model, 0.5, score_scale="l2")
    report = sparsifier.report()
    assert report.layers[1].zeros == 144
    assert math.isfinite(report.layers[1].threshold)
    assert report.zeros == budget(4200, 0.5) + report.ties
    assert report.ties == 0
    sparsifier.finalize()
    assert all(w.isfinite().all() for w in nets.prunable(model))


def brute_largest_below(level: np.float32, scale: np.float32) -> np.float32:
    """Bisection over the bit patterns of the non-negative finite float32: ``fl(scale * a)`` never decreases in a."""
    low, high = 0, 0x7F7FFFFF
    with np.errstate(all="ignore"):
        while low < high:
            middle = (low + high + 1) // 2
            fits = scale * np.uint32(middle).view(np.float32) <= level
            low, high = (middle, high) if fits else (low, middle - 1)
    return np.uint32(low).view(np.float32)


POSITIVE = st.floats(2.0**-149, 2.0**100, width=32)


@given(POSITIVE, st.floats(2.0**-100, 2.0**100, width=32) | st.just(0.0) | st.floats(0.0078125, 1.0, width=32))
def test_largest_below(level: float, scale: float) -> None:
    got = largest_below(torch.tensor([level]), torch.tensor([scale]))
    assert got.item() == float(brute_largest_below(np.float32(level), np.float32(scale)))


def test_largest_below_at_its_ends() -> None:
    levels, scales = torch.tensor([0.0, math.nan, math.inf]), torch.tensor([0.5, 0.5, 0.5])
    got = largest_below(levels, scales)
    assert got[0] == 0
    assert got[1].isnan()
    assert got[2] == math.inf
    double = largest_below(torch.tensor([1 / 3], dtype=torch.float64), torch.tensor([0.7], dtype=torch.float64)).numpy()
    assert 0.7 * double[0] <= 1 / 3 < 0.7 * np.nextafter(double[0], 1.0)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"scope": "local"}, ValueError, "scope must be one of global, layer, erk or a function, got 'local'"),
        ({"score_scale": "l1"}, ValueError, "score_scale must be one of none, l2, fan, got 'l1'"),
        ({"min_density": 1.5}, ValueError, r"min_density must be in \[0, 1\], got 1.5"),
        ({"min_density": math.nan}, ValueError, r"min_density must be in \[0, 1\], got nan"),
        ({"min_density": "5%"}, TypeError, "min_density must be a number, got '5%'"),
        ({"recompute": "keep"}, TypeError, "recompute must be None, True or False, got 'keep'"),
        ({"scope": lambda w, s: w[0].max(), "min_density": 0.1}, ValueError, "scope must be a name if"),
        ({"scope": lambda w, s: w[0].max(), "score_scale": "l2"}, ValueError, "scope must be a name if"),
        ({"grad_scale": lambda s: -1.0}, ValueError, "grad_scale must be a finite number of at least 0, got -1"),
        ({"grad_scale": lambda s: "half"}, TypeError, "grad_scale must be a number, got 'half'"),
    ],
)
def test_bad_policies_leave_the_model_dense(options: dict[str, Any], error: type[Exception], message: str) -> None:
    model = nets.conv_net()
    with pytest.raises(error, match=message):
        constant(model, 0.5, **options)
    assert type(model[0]) is nn.Conv2d


# ------------------------------------------------------------------------------ gradient scale


def train(model: nn.Module, sparsifier: fk.Sparsifier, steps: int = 1) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(nets.images()), torch.arange(8)).backward()
        optimizer.step()
        sparsifier.step()


def test_grad_scale_follows_the_sparsity_without_recompiling() -> None:
    torch._dynamo.reset()
    model = nets.conv_net()
    overrides = {"8": {"grad_scale": 0.25}}
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=12, grad_scale=lambda s: 1 - s, overrides=overrides)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    frames = []
    for _ in range(8):
        scales = [weight.uses[0].binding.grad_scale.item() for weight in sparsifier.weights]
        assert scales == pytest.approx([1 - sparsifier.sparsity] * 4 + [0.25])
        compiled(nets.images()).sum().backward()
        sparsifier.step()
        frames.append(counter.frame_count)
    assert frames == [1] * 8


def test_grad_scale_function_reaches_the_gradient() -> None:
    layer = nn.Linear(6, 4, bias=False)
    sparsifier = constant(layer, 0.5, grad_scale=lambda s: s / 2)
    layer(torch.ones(1, 6)).sum().backward()
    expected = torch.where(layer.weight.abs() <= sparsifier.threshold, 0.25, 1.0)
    assert layer.weight.grad.equal(expected)
