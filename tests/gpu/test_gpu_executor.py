"""The PTX executor against a real GPU: both get the same inputs, kernel by kernel.

Integers, order statistics and gradients (rounded once) must be equal bit for bit. Values of the thresholding operator
come from approximate instructions, which may differ; they may be neighbours.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import feather_kernels as fk
from tests.conftest import CPU, PTX_ARCHITECTURE, PTX_BACKEND, ptx_executor
from tests.gpu.gpu_device import GPU, NAMES, gpu_backend, on_a_gpu
from tests.support import samples
from tests.support.oracle import INTEGERS, same_bits

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

ops = torch.ops.feather_kernels


def thresholded(device: torch.device, dtype: torch.dtype, p: float, out_dtype: torch.dtype) -> Tensor:
    t = samples.scalar(0.3, dtype, device)
    return ops.threshold(samples.boundary_weights(t, dtype).to(device), t, p, out_dtype=out_dtype)


def scaled(device: torch.device, gradient_dtype: torch.dtype, dtype: torch.dtype) -> Tensor:
    t, scale = (samples.scalar(value, dtype, device) for value in (0.3, 0.25))
    w = samples.boundary_weights(t, dtype)
    return ops.scale_pruned_grad(samples.gradients(w, gradient_dtype).to(device), w.to(device), t, scale)


def lists(device: torch.device, wide: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    dtypes = (torch.float64,) * 3 if wide else samples.DTYPES[:3]
    sizes = (9000, 1031, 4096)
    return [torch.randn(n, generator=generator).to(dtype).to(device) for n, dtype in zip(sizes, dtypes, strict=True)]


def counted(device: torch.device) -> Tensor:
    return ops.count_pruned(lists(device), [torch.tensor(t, device=device) for t in (0.3, 1.0, 0.0)])


def histogram(device: torch.device) -> Tensor:
    start = torch.zeros(2, dtype=torch.int64, device=device)
    return ops.magnitude_histogram(lists(device), [0, 1, 0], start, 23, 8)


def selected(device: torch.device, *, wide: bool = False, scaled: bool = False, capped: bool = False) -> Tensor:
    weights = lists(device, wide)
    compute = torch.float64 if wide else torch.float32
    ranks = torch.tensor([6000, 900], device=device)
    scales = torch.tensor([1.0, 0.7, 1.3], dtype=compute, device=device) if scaled else None
    caps = torch.tensor([8000, 1000, 4096], device=device) if capped else None
    return ops.magnitude_select(weights, [0, 1, 0], ranks, scales=scales, caps=caps)


def selected_by_hint(device: torch.device, factor: float) -> Tensor:
    """With the result itself as hint, or one so far off that the radix passes must follow."""
    ranks = torch.tensor([6000, 900], device=device)
    hint = selected(device) * factor
    return ops.magnitude_select(lists(device), [0, 1, 0], ranks, hint=hint)


FLOAT16, BFLOAT16, FLOAT32, FLOAT64 = samples.DTYPES
PAIRS = [*((dtype, dtype) for dtype in samples.DTYPES), (FLOAT32, BFLOAT16), (FLOAT16, FLOAT32), (FLOAT64, FLOAT32)]
Calls = dict[str, Callable[[torch.device], Tensor]]


def values(*powers: float) -> Calls:
    return {
        f"threshold {dtype} to {out_dtype}, p = {p}".replace("torch.", ""): partial(
            thresholded, dtype=dtype, p=p, out_dtype=out_dtype
        )
        for dtype, out_dtype in PAIRS
        for p in powers
    }


VALUES = values(1.0, 2.0, 3.0, math.inf)
EXACT: Calls = {
    **{
        f"scale_pruned_grad {dtype} for {weight_dtype}".replace("torch.", ""): partial(
            scaled, gradient_dtype=dtype, dtype=weight_dtype
        )
        for weight_dtype, dtype in PAIRS
    },
    "count_pruned": counted,
    "magnitude_histogram": histogram,
    "magnitude_select": selected,
    "magnitude_select float64": partial(selected, wide=True),
    "magnitude_select scaled": partial(selected, scaled=True),
    "magnitude_select capped": partial(selected, scaled=True, capped=True),
    "magnitude_select hint": partial(selected_by_hint, factor=1.0),
    "magnitude_select wrong hint": partial(selected_by_hint, factor=7.0),
}


def ordered(tensor: Tensor) -> Tensor:
    """int64 numbers in the order of the values, one apart for neighbours; both zeros are 0. Without NaN."""
    integers = tensor.detach().cpu().view(INTEGERS[tensor.element_size()]).long()
    lowest = -(2 ** (8 * tensor.element_size() - 1))
    return torch.where(integers < 0, lowest - integers, integers)


def steps_apart(a: Tensor, b: Tensor) -> int:
    """Most representable numbers between elements of two tensors; NaN must stand in the same places."""
    a, b = a.cpu(), b.cpu()
    assert a.dtype == b.dtype
    assert a.isnan().equal(b.isnan())
    inside = ~a.isnan()
    return int((ordered(a[inside]) - ordered(b[inside])).abs().max())


def equal(a: Tensor, b: Tensor) -> bool:
    return same_bits(a, b) if a.is_floating_point() else a.equal(b)


@contextmanager
def simulated(name: str, architecture: int) -> Iterator[Any]:
    """The backend's compiled kernels on CPU tensors."""
    if name == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        simulator = ptx_executor(architecture, noise=False)
    else:
        from tests.simulated_gpu.executed_cuda import executed

        simulator = executed(architecture)
    with simulator as driver, fk.use_backend(name):
        yield driver


def kernels_of(name: str, driver: Any) -> set[str]:
    """Every kernel that a backend has."""
    if name == "cuda":
        from tests.simulated_gpu.executed_cuda import plain_name

        return {plain_name(entry) for entry in driver.entries}
    from feather_kernels.backends.triton import bracket, count, elementwise, radix, select

    modules = (bracket, count, elementwise, radix, select)
    return {name for module in modules for name in vars(module) if name.endswith("_kernel")}


def architecture_of(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def test_neighbours_are_one_step_apart() -> None:
    for dtype in samples.DTYPES:
        x = torch.tensor([1.0, -2.0, 0.0, math.inf, math.nan], dtype=dtype)
        assert steps_apart(x, x) == 0
        assert steps_apart(x, torch.tensor([1.0, -2.0, -0.0, math.inf, math.nan], dtype=dtype)) == 0
        tiny = torch.tensor([torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps], dtype=dtype)
        assert steps_apart(tiny, -tiny) == 2
        next_to_one = torch.tensor([1.0 + torch.finfo(dtype).eps], dtype=dtype)
        assert steps_apart(torch.ones(1, dtype=dtype), next_to_one) == 1


@pytest.mark.skipif(PTX_ARCHITECTURE == 0, reason="needs the PTX executor")
def test_the_calls_reach_every_kernel_and_agree_with_the_reference() -> None:
    with simulated(PTX_BACKEND, PTX_ARCHITECTURE) as driver:
        results = {name: call(CPU) for name, call in {**VALUES, **EXACT}.items()}
    assert {launch.kernel for launch in driver.launches} == kernels_of(PTX_BACKEND, driver)
    with fk.use_backend("reference"):
        for name, call in EXACT.items():
            assert equal(results[name], call(CPU)), name
        for name, call in VALUES.items():
            assert steps_apart(results[name], call(CPU)) <= 8, name  # the bounds of both, with room


@on_a_gpu
@pytest.mark.parametrize(("name", "call"), [(name, call) for name in NAMES for call in (*VALUES, *EXACT)])
def test_the_device_does_as_simulated(name: str, call: str) -> None:
    compute = {**VALUES, **EXACT}[call]
    with gpu_backend(name):
        on_device = compute(GPU).cpu()
    with simulated(name, architecture_of(GPU)):
        on_executor = compute(CPU)
    if call in VALUES:
        assert steps_apart(on_device, on_executor) <= 1
    else:
        assert equal(on_device, on_executor)
