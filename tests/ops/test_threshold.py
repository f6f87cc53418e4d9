"""The thresholding operator and its gradient scaling: every backend against the long-double oracle."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hypothesis_numpy

from feather_kernels.ops import schema
from tests.conftest import SLOW_DEVICE, BackendUnderTest, each_power
from tests.support import oracle, samples

ops = torch.ops.feather_kernels
NAN = math.nan


def bound(dtype: torch.dtype, out_dtype: torch.dtype, p: float) -> float:
    """Largest error allowed, in ulps of the result (docs/design/numerics.md)."""
    if out_dtype in (torch.float16, torch.bfloat16):
        return 0.55
    return 5.0 if dtype == torch.float64 and p < 3 and p not in (1, 2) else 2.0


def rounded_to(dtype: torch.dtype, result: torch.Tensor) -> torch.Tensor:
    """A float64 result of arithmetic in ``dtype``, in that dtype, so that its error is counted in its ulps."""
    return result.to(dtype) if result.dtype == torch.float64 else result


@pytest.mark.parametrize("exponent", [0, 3, 8, 10, 14, 30])
def test_denormal_thresholds_of_doubles(backend: BackendUnderTest, exponent: int) -> None:
    """T and the weights just above it are a few of the least steps that a double can make."""
    least = torch.tensor(5e-324, dtype=torch.float64)
    t = (least * 2**exponent).to(backend.device)
    weights = t + least.to(backend.device) * torch.tensor([0.0, 1, 2, 3, 5, 9, 1000, -1]).to(t)
    y = ops.threshold(weights, t, 3.0)
    assert oracle.ulp_error(y, oracle.threshold(weights, t, 3.0)) <= 2


@each_power
@pytest.mark.parametrize("dtype", samples.DTYPES, ids=str)
@pytest.mark.parametrize("t", samples.THRESHOLDS)
def test_values_at_every_boundary(backend: BackendUnderTest, t: float, dtype: torch.dtype, p: float) -> None:
    backend.skip_inexact(dtype)
    threshold = samples.scalar(t, dtype, backend.device)
    weights = samples.boundary_weights(threshold, dtype).to(backend.device)
    exact = oracle.threshold(weights, threshold, p)
    for out_dtype in samples.DTYPES:
        if out_dtype == torch.bfloat16 and not backend.exact_bfloat16:
            continue
        y = ops.threshold(weights, threshold, p, out_dtype=out_dtype)
        assert y.dtype == out_dtype
        error = oracle.ulp_error(rounded_to(oracle.compute_dtype(dtype), y), exact)
        assert error <= bound(dtype, out_dtype, p), f"{out_dtype}"
        if out_dtype == dtype:
            assert not (y.abs() > weights.abs()).any(), "P never exceeds the weight"
        zeroed = torch.from_numpy(oracle.pruned(weights, threshold)).to(backend.device)
        assert oracle.same_bits(y[zeroed], torch.zeros_like(y[zeroed])), "a pruned output must be +0.0"


@pytest.mark.parametrize("dtype", samples.DTYPES, ids=str)
@pytest.mark.parametrize("t", [0.0, -0.0, -1.0, -math.inf])
@each_power
def test_non_positive_threshold_is_the_identity_bit_for_bit(
    backend: BackendUnderTest, t: float, dtype: torch.dtype, p: float
) -> None:
    backend.skip_inexact(dtype)
    threshold = samples.scalar(t, dtype, backend.device)
    weights = samples.boundary_weights(threshold, dtype).to(backend.device)
    assert oracle.same_bits(ops.threshold(weights, threshold, p), weights)
    gradient = samples.gradients(weights, dtype).to(backend.device)
    half = samples.scalar(0.5, dtype, backend.device)
    assert oracle.same_bits(ops.scale_pruned_grad(gradient, weights, threshold, half), gradient)


def test_nan_threshold_prunes_nothing_and_shows(backend: BackendUnderTest) -> None:
    weights = torch.tensor([0.0, 1.0, -5.0, 1e9], device=backend.device)
    nan = samples.scalar(NAN, weights.dtype, backend.device)
    for p in backend.powers:
        assert ops.threshold(weights, nan, p).isnan().all()
    gradient = torch.ones(4, device=backend.device)
    assert ops.scale_pruned_grad(gradient, weights, nan, torch.zeros_like(nan)).equal(gradient)
    assert ops.count_pruned([weights], [nan]).item() == 0


@pytest.mark.parametrize("layout", samples.LAYOUTS)
@pytest.mark.parametrize("shape", samples.SHAPES if SLOW_DEVICE else (*samples.SHAPES, samples.LARGE), ids=str)
@pytest.mark.parametrize("dtype", samples.DTYPES, ids=str)
def test_shapes_and_strides(backend: BackendUnderTest, dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> None:
    backend.skip_inexact(dtype)
    torch.manual_seed(len(shape))
    w = samples.LAYOUTS[layout](torch.randn(shape, dtype=torch.float64).to(dtype).to(backend.device))
    t, scale = (samples.scalar(v, dtype, backend.device) for v in (0.7, 0.25))
    for p in backend.powers:
        y = ops.threshold(w, t, p)
        assert y.shape == w.shape
        assert y.stride() == torch.empty_like(w).stride()
        assert oracle.ulp_error(y, oracle.threshold(w, t, p)) <= bound(dtype, dtype, p)
        assert ops.threshold_recompute(w, t, p, y).equal(y)

    g = samples.LAYOUTS[layout](torch.randn(shape, dtype=torch.float64).to(dtype).to(backend.device))
    scaled = ops.scale_pruned_grad(g, w, t, scale)
    assert scaled.stride() == torch.empty_like(w).stride()
    assert oracle.ulp_error(scaled, oracle.scaled_gradient(g, w, t, 0.25)) <= 0.5
    assert ops.count_pruned([w], [t]).tolist() == [int(oracle.pruned(w, t).sum())]


@pytest.mark.parametrize("layout", samples.WRITABLE_LAYOUTS)
@pytest.mark.parametrize("shape", samples.SHAPES, ids=str)
def test_written_into_what_is_given(backend: BackendUnderTest, shape: tuple[int, ...], layout: str) -> None:
    place = samples.WRITABLE_LAYOUTS[layout]
    w = place(torch.randn(shape, device=backend.device))
    t = samples.scalar(0.7, w.dtype, backend.device)
    expected = ops.threshold(w, t, 3.0)
    for dtype in samples.DTYPES:
        if dtype == torch.bfloat16 and not backend.exact_bfloat16:
            continue
        out = place(torch.full(shape, 5.0, dtype=dtype, device=backend.device))
        assert ops.threshold.out(w, t, 3.0, out=out) is None
        assert out.equal(expected.to(dtype))
    ops.threshold.out(w, t, 3.0, out=w)
    assert w.equal(expected), "out may be the weight itself"


def test_neighbours_of_a_written_view_are_untouched(backend: BackendUnderTest) -> None:
    buffer = torch.full((64,), 9.0, device=backend.device)
    view = buffer[3:40]
    t = samples.scalar(100.0, view.dtype, backend.device)
    ops.threshold.out(view, t, 3.0, out=view)
    expected = torch.full((64,), 9.0, device=backend.device)
    expected[3:40] = 0
    assert buffer.equal(expected)


@pytest.mark.parametrize("out_dtype", samples.DTYPES, ids=str)
@pytest.mark.parametrize("gradient_dtype", samples.DTYPES, ids=str)
@pytest.mark.parametrize("dtype", samples.DTYPES, ids=str)
@pytest.mark.parametrize("value", [0.5, 0.0, 0.3])
def test_gradient_in_every_mix_of_dtypes(
    backend: BackendUnderTest,
    value: float,
    dtype: torch.dtype,
    gradient_dtype: torch.dtype,
    out_dtype: torch.dtype,
) -> None:
    backend.skip_inexact(dtype, gradient_dtype, out_dtype)
    t, scale = (samples.scalar(v, dtype, backend.device) for v in (0.3, value))
    w = samples.boundary_weights(t, dtype).to(backend.device)
    g = samples.gradients(w, gradient_dtype).to(backend.device)
    scaled = ops.scale_pruned_grad(g, w, t, scale, out_dtype=out_dtype)
    assert scaled.dtype == out_dtype
    with np.errstate(invalid="ignore"):
        exact = oracle.scaled_gradient(g, w, t, scale.item())
    arithmetic = torch.promote_types(gradient_dtype, oracle.compute_dtype(dtype))
    assert oracle.ulp_error(rounded_to(arithmetic, scaled), exact) <= 0.55
    kept = ~torch.from_numpy(oracle.pruned(w, t)).to(backend.device)
    assert oracle.same_bits(scaled[kept], g[kept].to(out_dtype))
    if arithmetic == torch.float32:
        product = torch.where(kept, g.float(), g.float() * scale)
        assert oracle.same_bits(scaled, product.to(out_dtype)), "one product, rounded, and its rounding"


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    weights=hypothesis_numpy.arrays(
        np.float32, hypothesis_numpy.array_shapes(max_dims=3, max_side=9), elements=st.floats(width=32)
    ),
    t=st.floats(width=32),
    data=st.data(),
)
def test_any_values(backend: BackendUnderTest, weights: np.ndarray, t: float, data: st.DataObject) -> None:
    p = data.draw(st.sampled_from(backend.powers))
    w, threshold = torch.from_numpy(weights).to(backend.device), torch.tensor(t, device=backend.device)
    assert oracle.ulp_error(ops.threshold(w, threshold, p), oracle.threshold(w, threshold, p)) <= 2
    count = int(oracle.pruned(w, threshold).sum())
    assert ops.count_pruned([w], [threshold]).tolist() == [count]
    scaled = ops.scale_pruned_grad(torch.ones_like(w), w, threshold, torch.full_like(threshold, 0.5))
    assert int((scaled == 0.5).sum()) == count


def test_counts_of_a_list(backend: BackendUnderTest) -> None:
    weights = [torch.randn(n, device=backend.device).to(d) for n, d in ((0, torch.float32), (999, torch.float16))]
    weights.append(torch.randn(50, 60, device=backend.device, dtype=torch.float64).t())
    thresholds = [samples.scalar(v, w.dtype, backend.device) for v, w in zip((0.5, 0.5, 1.0), weights, strict=True)]
    counts = ops.count_pruned(weights, thresholds)
    assert counts.dtype == torch.int64
    assert counts.tolist() == [int(oracle.pruned(w, t).sum()) for w, t in zip(weights, thresholds, strict=True)]


@pytest.mark.slow
@each_power
@pytest.mark.parametrize("t", [0.0123, 0.3, 1.0, 1.9999, 7.7, 1e-6, 1e-30, 1e30])
def test_every_float_of_the_binades_above_the_threshold(backend: BackendUnderTest, t: float, p: float) -> None:
    """2^21 consecutive floats from T on and 2^21 spread over the next 30 binades."""
    threshold = samples.scalar(t, torch.float32, backend.device)
    start = int(threshold.view(torch.int32))
    consecutive = torch.arange(start, start + (1 << 21), dtype=torch.int32)
    spread = torch.linspace(start, min(start + (30 << 23), 0x7F7FFFFF), 1 << 21, dtype=torch.float64).to(torch.int32)
    for keys in (consecutive, spread):
        w = keys.view(torch.float32).to(backend.device)
        assert oracle.ulp_error(ops.threshold(w, threshold, p), oracle.threshold(w, threshold, p)) <= 2


def test_fakes_allocate_what_the_kernels_return(backend: BackendUnderTest) -> None:
    w = torch.randn(4, 3, 5, 5, device=backend.device).contiguous(memory_format=torch.channels_last)
    t = samples.scalar(0.5, w.dtype, backend.device)
    real = ops.threshold(w, t, 3.0, out_dtype=torch.bfloat16)
    fake = schema.threshold(w.to("meta"), t.to("meta"), 3.0, out_dtype=torch.bfloat16)
    assert (real.shape, real.dtype, real.stride()) == (fake.shape, fake.dtype, fake.stride())
