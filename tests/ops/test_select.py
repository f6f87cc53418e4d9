"""Selection and histograms: bit-equal to sorting, on every backend, and nothing read on the host."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy
from torch import Tensor

import feather_kernels as fk
from feather_kernels.functional import magnitude_threshold
from feather_kernels.quantile import interpolate
from tests.conftest import CUDA_MODULE, SLOW_DEVICE, BackendUnderTest
from tests.support import oracle, samples
from tests.support.no_host_read import NoHostRead

ops = torch.ops.feather_kernels
NAN, INF = math.nan, math.inf


def weight_lists() -> dict[str, list[Tensor]]:
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=g).to(dtype)

    return {
        "random": [randn(1000, 7), randn(333), randn(1)],
        "ties": [torch.randint(-3, 4, (999,), generator=g).float(), torch.ones(50)],
        "all equal": [torch.full((100,), -2.5), torch.full((7,), 2.5)],
        "zeros": [torch.zeros(20), -torch.zeros(20), randn(5)],
        "denormal": [torch.arange(1, 400, dtype=torch.int32).view(torch.float32), randn(10) * 1e-38],
        "nan and inf": [torch.tensor([1.0, NAN, -2.0, -INF, -NAN, 0.0, -0.0, INF, 5.0]), randn(3)],
        "all nan": [torch.full((4,), NAN), torch.full((2,), -NAN)],
        "one element": [torch.tensor(3.0)],
        "with empty": [torch.empty(0), randn(5), torch.empty(3, 0)],
        "bfloat16": [randn(777, dtype=torch.bfloat16)],
        "float16": [randn(777, dtype=torch.float16)],
        "mixed dtypes": [randn(64), randn(500, dtype=torch.bfloat16), randn(9, 9, dtype=torch.float16)],
        "float64": [randn(999).double() * (1 + 1e-12), torch.tensor([NAN, 1e300, 1e-310, 0.0]).double()],
        "strided": [randn(30, 40).t(), randn(60)[::3], randn(1, 5).expand(7, 5), randn(17)[1:]],
        "channels last": [randn(8, 6, 3, 3).contiguous(memory_format=torch.channels_last)],
        "more than a chunk": [randn(20_001 if SLOW_DEVICE else 600_001), randn(3)],
    }


def ranks(count: int) -> list[int]:
    inside = {0, 1, count // 10, count // 2, int((count - 1) * 0.95), count - 2, count - 1}
    return sorted({rank for rank in inside if 0 <= rank < count})


@pytest.mark.parametrize("name", weight_lists())
def test_equals_sorting_bit_for_bit(backend: BackendUnderTest, name: str) -> None:
    weights = weight_lists()[name]
    parts = [oracle.scores(w) for w in weights]
    moved = [w.to(backend.device) for w in weights]
    for rank in [-1, *ranks(sum(map(len, parts))), sum(map(len, parts))]:
        values = ops.magnitude_select(moved, [0] * len(moved), torch.tensor([rank], device=backend.device))
        assert oracle.same_bits(values[0], oracle.order_statistics(parts, rank)), f"rank {rank}"


def test_one_pass_for_several_groups(backend: BackendUnderTest) -> None:
    torch.manual_seed(0)
    weights = [torch.randn(n) for n in (50, 70, 1, 300, 20)]
    groups = [2, 0, 2, 1, 2]
    rank = torch.tensor([35, 150, 70])
    values = ops.magnitude_select([w.to(backend.device) for w in weights], groups, rank.to(backend.device))
    assert values.shape == (3, 2)
    for group in range(3):
        parts = [oracle.scores(w) for w, g in zip(weights, groups, strict=True) if g == group]
        assert oracle.same_bits(values[group], oracle.order_statistics(parts, int(rank[group])))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_empty_group_gives_nan(backend: BackendUnderTest, dtype: torch.dtype) -> None:
    """The same NaN as where the rank falls on NaN weights, whatever their bits."""
    payloads = oracle.QUIET_NAN[dtype] + torch.tensor([1, 5], dtype=oracle.INTEGERS[dtype.itemsize])
    nans = torch.cat([payloads.view(dtype), torch.tensor([-NAN, 1.0], dtype=dtype)])
    weights = [w.to(backend.device, dtype) for w in (torch.empty(0), torch.ones(3), nans)]
    found = ops.magnitude_select(weights, [0, 1, 2], torch.tensor([0, 2, 1], device=backend.device))
    quiet = oracle.QUIET_NAN[dtype]
    assert found[[0, 2]].cpu().view(oracle.INTEGERS[dtype.itemsize]).tolist() == [[quiet, quiet]] * 2
    assert found[1].tolist() == [1, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scales(backend: BackendUnderTest, dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weights = [torch.randn(200).to(dtype), torch.randn(300).to(dtype), torch.tensor([INF, 0.0, NAN]).to(dtype)]
    scales = [0.3, 1.7, 0.0]
    parts = [oracle.scores(w, s) for w, s in zip(weights, scales, strict=True)]
    for rank in (0, 250, 400, 502):
        values = ops.magnitude_select(
            [w.to(backend.device) for w in weights],
            [0, 0, 0],
            torch.tensor([rank], device=backend.device),
            scales=torch.tensor(scales, dtype=dtype, device=backend.device),
        )
        assert oracle.same_bits(values[0], oracle.order_statistics(parts, rank))


@pytest.mark.parametrize("seed", range(20))
def test_caps_select_from_the_union_of_the_smallest(backend: BackendUnderTest, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 200, (5,), generator=g).tolist()
    weights = [torch.randn(n, generator=g) * 3 for n in sizes]
    if seed % 2:  # coarse values: ties within and across the caps
        weights = [w.round() for w in weights]
    groups = [0, 1, 0, 0, 1]
    caps = [int(torch.randint(0, n + 1, (), generator=g)) for n in sizes]
    parts = [oracle.scores(w) for w in weights]
    for fraction in (0.0, 0.4, 0.9, 1.0):
        members = [[i for i in range(5) if groups[i] == group] for group in (0, 1)]
        totals = [sum(caps[i] for i in member) for member in members]
        rank = [int((total - 1) * fraction) for total in totals]
        values = ops.magnitude_select(
            [w.to(backend.device) for w in weights],
            groups,
            torch.tensor(rank, device=backend.device),
            caps=torch.tensor(caps, device=backend.device),
        )
        for group, member in enumerate(members):
            expected = oracle.order_statistics([parts[i] for i in member], rank[group], [caps[i] for i in member])
            assert oracle.same_bits(values[group], expected)


def test_hint_never_changes_the_result(backend: BackendUnderTest) -> None:
    weights = [torch.randn(5000, device=backend.device)]
    rank = torch.tensor([4000], device=backend.device)
    expected = ops.magnitude_select(weights, [0], rank)
    for hint in ([0.0, 0.0], [1e9, 1e9], [NAN, NAN], [2.0, 1.0], expected[0].tolist()):
        given_hint = torch.tensor([hint], device=backend.device)
        assert oracle.same_bits(ops.magnitude_select(weights, [0], rank, hint=given_hint), expected)


@pytest.mark.parametrize("drift", [1e-3, 1e-5])
@pytest.mark.parametrize("kind", ["random", "ties", "zeros", "few", "scaled"])
def test_hint_of_the_step_before(backend: BackendUnderTest, kind: str, drift: float) -> None:
    """Weights drift as under an optimizer; the groups' ranks are the first, the last and those between."""
    g = torch.Generator().manual_seed(5)
    before = [torch.randn(n, generator=g) for n in ((9, 5, 1) if kind == "few" else (4000, 900, 3, 700))]
    if kind == "ties":
        before = [w.mul(4).round() for w in before]
    if kind == "zeros":
        before = [w.where(torch.rand(w.shape, generator=g) < 0.2, 0.0) for w in before]
    after = [w * (1 + drift * torch.randn(w.shape, generator=g)) for w in before]
    groups = [0, 1, 0, 1][: len(before)]
    scales = [0.5, 1.0, 3.0, 1.0][: len(before)] if kind == "scaled" else None
    totals = [sum(w.numel() for w, own in zip(before, groups, strict=True) if own == group) for group in (0, 1)]

    def select(weights: list[Tensor], rank: list[int], hint: Tensor | None) -> Tensor:
        return ops.magnitude_select(
            [w.to(backend.device) for w in weights],
            groups,
            torch.tensor(rank, device=backend.device),
            scales=None if scales is None else torch.tensor(scales, device=backend.device),
            hint=hint,
        )

    for fraction in (0.0, 0.3, 0.9, 1.0):
        rank = [int((total - 1) * fraction) for total in totals]
        hint = select(before, rank, None)
        values = select(after, rank, hint)
        for group in (0, 1):
            members = [i for i in range(len(after)) if groups[i] == group]
            parts = [oracle.scores(after[i], 1.0 if scales is None else scales[i]) for i in members]
            assert oracle.same_bits(values[group], oracle.order_statistics(parts, rank[group]))
        assert oracle.same_bits(select(before, rank, hint), hint)


@pytest.mark.parametrize("bits", [15, 17])
def test_rows_of_a_wide_bracket(
    backend: BackendUnderTest, executor: Any, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    """Keys at chosen places of a bracket of 2^bits keys: a value and its neighbour in any two of its rows."""
    if backend.name not in ("triton", "cuda"):
        pytest.skip("has no such bracket")
    if CUDA_MODULE:
        pytest.skip("this build has narrower brackets: csrc/tests/cuda tries its widest")
    module = "feather_kernels.backends." + {"triton": "triton.select", "cuda": "cuda"}[backend.name]
    monkeypatch.setattr(f"{module}.element_count", lambda weights: 2 * 16 << bits)  # 16 elements a key, 2 groups
    hint = torch.tensor([[1.0, 1.0], [0.5, 0.5]])
    row, middle, last = 512, 1 << bits - 1, (1 << bits) - 1
    at = [0, 1, row - 1, row, row + 1, 2 * row, middle - row, middle, middle, middle + 3 * row, last - row, last, last]
    first = torch.tensor(1.0).view(torch.int32) - middle
    inside = (first + torch.tensor(at, dtype=torch.int32)).view(torch.float32)
    torch.manual_seed(0)
    weights = [torch.cat([inside.flip(0), -torch.rand(50) * 0.25, 4 + torch.rand(20)]), torch.full((40,), -0.5)]
    moved = [w.to(backend.device) for w in weights]
    found = []
    for rank in range(48, 64):
        launched = len(executor.launches) if executor else 0
        ranks_of_groups = (rank, rank % 40)
        rank_tensor = torch.tensor(ranks_of_groups, device=backend.device)
        values = ops.magnitude_select(moved, [0, 1], rank_tensor, hint=hint.to(backend.device))
        for own, w, r in zip(values, weights, ranks_of_groups, strict=True):
            assert oracle.same_bits(own, oracle.order_statistics([oracle.scores(w)], r)), f"rank {rank}"
        if executor:
            passes = [report.bytes_read for report in executor.launches[launched:] if "histogram" in report.kernel]
            found.append(max(passes) < 4 * weights[0].numel())
    if executor:
        assert found == [50 <= rank < 62 for rank in range(48, 64)], "those with their neighbour inside"


@pytest.mark.parametrize("bits", [1, 7, 11])
def test_histogram_counts_keys_under_the_prefix(backend: BackendUnderTest, bits: int) -> None:
    weights = [w.to(backend.device) for w in weight_lists()["mixed dtypes"]]
    groups = [1, 0, 1]
    shift = 31 - bits
    start = torch.zeros(2, dtype=torch.int64, device=backend.device)
    counts = ops.magnitude_histogram(weights, groups, start, shift, bits)
    assert counts.dtype == torch.int64
    assert counts.shape == (2, 1 << bits)
    keys = [oracle.scores(w).view(torch.int32).long() for w in weights]
    for group in (0, 1):
        mine = torch.cat([k for k, g in zip(keys, groups, strict=True) if g == group])
        assert counts[group].cpu().equal(torch.bincount(mine >> shift, minlength=1 << bits))
        prefix = mine[0] >> shift
        deeper = ops.magnitude_histogram(weights, groups, prefix.repeat(2).to(backend.device), shift - 4, 4)
        below = mine[(mine >> shift) == prefix]
        assert deeper[group].cpu().equal(torch.bincount((below >> (shift - 4)) & 15, minlength=16))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    arrays=st.lists(
        hypothesis_numpy.arrays(np.float32, st.integers(0, 30), elements=st.floats(width=32)), min_size=1, max_size=4
    ),
    fraction=st.floats(0, 1, exclude_max=True),
)
def test_any_values(backend: BackendUnderTest, arrays: list[np.ndarray], fraction: float) -> None:
    weights = [torch.from_numpy(a).to(backend.device) for a in arrays]
    rank = int(sum(w.numel() for w in weights) * fraction)
    values = ops.magnitude_select(weights, [0] * len(weights), torch.tensor([rank], device=backend.device))
    assert oracle.same_bits(values[0], oracle.order_statistics([oracle.scores(w) for w in weights], rank))


def test_reads_nothing_on_the_host(backend: BackendUnderTest) -> None:
    weights = [torch.randn(1000, device=backend.device), torch.randn(20, 30, device=backend.device).t()]
    rank = torch.tensor([1300], device=backend.device)
    caps, scales = torch.tensor([900, 500], device=backend.device), torch.tensor([1.0, 2.0], device=backend.device)
    with NoHostRead() as mode:
        values = ops.magnitude_select(weights, [0, 0], rank, caps=caps, scales=scales)
        ops.count_pruned(weights, [values[0, 0], values[0, 1]])
        ops.scale_pruned_grad(weights[0], weights[0], values[0, 0], values[0, 1])
        ops.threshold(weights[1], values[0, 0], 3.0)
    assert mode.ops, "the mode saw the ops inside"
    with pytest.raises(AssertionError, match="reads a tensor on the host"), NoHostRead():
        rank.item()


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.95, 0.999])
@pytest.mark.parametrize("dtype", samples.DTYPES, ids=str)
def test_threshold_prunes_what_was_asked_for(backend: BackendUnderTest, dtype: torch.dtype, sparsity: float) -> None:
    torch.manual_seed(3)
    weights = [torch.randn(n, dtype=torch.float64).to(dtype).to(backend.device) for n in (4000, 77, 1)]
    t = magnitude_threshold(weights, sparsity)
    values = torch.cat([oracle.scores(w) for w in weights]).sort().values
    rank = math.floor((len(values) - 1) * sparsity)
    assert values[rank] <= t.cpu()
    assert t.cpu() < values[values > values[rank]].min()
    zeros = int(ops.count_pruned(weights, [t] * 3).sum())
    assert zeros == int((values <= values[rank]).sum()) >= rank + 1


def test_interpolation_never_reaches_the_upper_value() -> None:
    one = torch.tensor(1.0)
    above = torch.nextafter(one, torch.tensor(2.0))
    for low, high, fraction, expected in (
        (1.0, 3.0, 0.5, 2.0),
        (1.0, 3.0, 0.0, 1.0),
        (1.0, above.item(), 0.9, 1.0),  # the lerp rounds up to v1
        (1.0, 1.0, 0.5, 1.0),
        (1.0, INF, 0.5, 1.0),
        (1.0, INF, 0.0, 1.0),
        (INF, INF, 0.5, INF),
        (1.0, NAN, 0.5, 1.0),
    ):
        assert interpolate(torch.tensor([low, high]), fraction).item() == expected
    assert interpolate(torch.tensor([NAN, NAN]), 0.5).isnan()


def test_sparsity_zero_prunes_nothing() -> None:
    assert fk.functional.magnitude_threshold(torch.randn(10), 0.0).item() == 0
    assert fk.functional.magnitude_threshold(torch.randn(10).double(), 0.0).dtype == torch.float64
