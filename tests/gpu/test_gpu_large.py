"""Tensors of more than 2^31 elements. On the CPU the checks themselves are tested, with few elements."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tests.conftest import BackendUnderTest
from tests.gpu.gpu_device import GPU, NAMES, gpu_backend, on_a_gpu

ops = torch.ops.feather_kernels

LIMIT = 2**31
LARGE = LIMIT + 4099  # no multiple of a block
SMALL = 40_009
DTYPES = (torch.float16, torch.bfloat16)


class Marked(NamedTuple):
    """Weights of 0.5, but for values from 2 up at some places: both ends, the middle, either side of 2^31."""

    weights: Tensor
    places: list[int]
    values: list[float]


def marked(count: int, dtype: torch.dtype, device: torch.device) -> Marked:
    middle = count // 2
    places = [0, 1, middle - 1, middle, LIMIT - 1, LIMIT, LIMIT + 1, count - 2, count - 1]
    places = sorted(place for place in places if place < count)
    values = [2.0 + index for index in range(len(places))]
    weights = torch.full((count,), 0.5, dtype=dtype, device=device)
    for place, value in zip(places, values, strict=True):
        weights[place] = value
    return Marked(weights, places, values)


def at(tensor: Tensor, places: list[int]) -> list[float]:
    return [tensor[place].item() for place in places]


def equal_to(tensor: Tensor, value: float) -> int:
    """Number of elements, in slices: no temporary of the tensor's size."""
    return sum(int((part == value).sum()) for part in tensor.split(1 << 28))


def check_threshold(given: Marked) -> None:
    w, t = given.weights, torch.ones((), device=given.weights.device)
    y = ops.threshold(w, t, 1.0)
    assert at(y, given.places) == [value - 1 for value in given.values]
    assert equal_to(y, 0.0) == w.numel() - len(given.places)


def check_gradient(given: Marked) -> None:
    w = given.weights
    t, half = torch.ones((), device=w.device), torch.full((), 0.5, device=w.device)
    g = torch.ones_like(w)
    g = ops.scale_pruned_grad(g, w, t, half)
    assert at(g, given.places) == [1.0] * len(given.places)
    assert equal_to(g, 0.5) == w.numel() - len(given.places)


def check_count(given: Marked) -> None:
    w, t = given.weights, torch.ones((), device=given.weights.device)
    assert ops.count_pruned([w], [t]).tolist() == [w.numel() - len(given.places)]


def check_selection(given: Marked) -> None:
    w, values = given.weights, given.values
    first = w.numel() - len(values)  # rank of the smallest marked value
    expected = {0: [0.5, 0.5], first - 1: [0.5, values[0]], first + 1: values[1:3], w.numel() - 1: [values[-1]] * 2}
    for rank, pair in expected.items():
        ranks, hint = torch.tensor([rank], device=w.device), torch.tensor([pair], device=w.device)
        for given_hint in (None, hint, hint + 1):
            assert ops.magnitude_select([w], [0], ranks, hint=given_hint).tolist() == [pair]


def check_histogram(given: Marked) -> None:
    w = given.weights
    prefix = torch.zeros(1, dtype=torch.int64, device=w.device)
    counts = ops.magnitude_histogram([w], [0], prefix, 23, 8)[0]
    assert counts.sum().item() == w.numel()
    assert counts[126].item() == w.numel() - len(given.places), "0.5 has the biased exponent 126"


CHECKS: dict[str, Callable[[Marked], None]] = {
    "threshold": check_threshold,
    "gradient": check_gradient,
    "count": check_count,
    "selection": check_selection,
    "histogram": check_histogram,
}


@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_checks_with_few_elements(backend: BackendUnderTest, dtype: torch.dtype, check: str) -> None:
    backend.skip_inexact(dtype)
    CHECKS[check](marked(SMALL, dtype, backend.device))


@on_a_gpu
@pytest.mark.parametrize("check", CHECKS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_more_than_two_to_the_31_elements(name: str, dtype: torch.dtype, check: str) -> None:
    torch.cuda.empty_cache()
    needed, free = 3 * LARGE * dtype.itemsize, torch.cuda.mem_get_info()[0]
    if free < needed:
        pytest.skip(f"needs {needed / 1e9:.0f} GB of free GPU memory, there are {free / 1e9:.0f}")
    with gpu_backend(name):
        CHECKS[check](marked(LARGE, dtype, GPU))
