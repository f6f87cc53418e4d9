"""The op contract: opcheck on every op, and every bad argument refused with its name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from feather_kernels.ops import schema
from tests.conftest import BackendUnderTest

ops = torch.ops.feather_kernels


def arguments(device: torch.device) -> dict[str, tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments for every op: a dense, a transposed and an empty tensor, mixed dtypes."""
    w = torch.randn(6, 4, device=device)
    low = torch.randn(5, device=device).bfloat16()
    t, half = torch.tensor(0.6, device=device), torch.tensor(0.5, device=device)
    rank = torch.tensor([3, 7], device=device)
    lists = [w, low, torch.empty(0, device=device)], [1, 0, 1]
    scales = torch.rand(3, device=device)
    caps, hint = torch.tensor([20, 5, 0], device=device), torch.zeros(2, 2, device=device)
    return {
        "threshold": ((w.t(), t, 3.0), {"out_dtype": torch.bfloat16}),
        "threshold.out": ((w, t, math.inf), {"out": torch.empty_like(w)}),
        "threshold_recompute": ((w, t, 2.0, low), {}),
        "scale_pruned_grad": ((w.half(), w, t, half), {"out_dtype": torch.float64}),
        "magnitude_select": (
            (*lists, rank),
            {"scales": scales, "caps": caps, "hint": hint},
        ),
        "magnitude_histogram": ((*lists, torch.zeros_like(rank), 20, 11), {"scales": scales}),
        "count_pruned": (([w, low], [t, t]), {}),
    }


def overload(name: str) -> Any:
    packet, _, kind = name.partition(".")
    return getattr(getattr(ops, packet), kind or "default")


def test_every_op_is_in_the_table() -> None:
    assert set(arguments(torch.device("cpu"))) == set(schema.OPS)


@pytest.mark.parametrize("name", schema.OPS)
def test_opcheck(backend: BackendUnderTest, name: str) -> None:
    args, kwargs = arguments(backend.device)[name]
    torch.library.opcheck(overload(name), args, kwargs)


@pytest.mark.parametrize("name", schema.OPS)
def test_fake_agrees_with_the_result(backend: BackendUnderTest, name: str) -> None:
    args, kwargs = arguments(backend.device)[name]
    result = overload(name)(*args, **kwargs)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        fake = overload(name)(*args, **kwargs)
    if result is None:
        assert fake is None
    else:
        assert (fake.shape, fake.dtype, fake.stride()) == (result.shape, result.dtype, result.stride())


@pytest.mark.parametrize("name", [name for name in schema.OPS if name not in ("magnitude_histogram", "count_pruned")])
def test_raw_op_refuses_to_lose_a_gradient(backend: BackendUnderTest, name: str) -> None:
    args, kwargs = arguments(backend.device)[name]
    leaf = torch.randn(6, 4, device=backend.device, requires_grad=True)
    args = ([leaf, *args[0][1:]], *args[1:]) if isinstance(args[0], list) else (args[0], leaf, *args[2:])
    if name.startswith("threshold"):
        args = (leaf.t() if name == "threshold" else leaf, *arguments(backend.device)[name][0][1:])

    def run_and_differentiate() -> None:
        result = overload(name)(*args, **kwargs)
        assert result.requires_grad, "ops that write in place raise at once, the others in backward"
        result.sum().backward()

    with pytest.raises(RuntimeError, match="no derivative"):
        run_and_differentiate()
    with torch.no_grad():
        overload(name)(*args, **kwargs)


@pytest.mark.parametrize(("name", "written"), [("threshold.out", "out")])
def test_autograd_notices_what_is_written_in_place(backend: BackendUnderTest, name: str, written: str | int) -> None:
    args, kwargs = arguments(backend.device)[name]
    saved = kwargs[written] if isinstance(written, str) else args[written]
    leaf = torch.ones_like(saved, requires_grad=True)
    product = leaf * saved
    overload(name)(*args, **kwargs)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():  # whose tensors have no version
        args, kwargs = arguments(backend.device)[name]
        overload(name)(*args, **kwargs)


W = torch.randn(3, 4)
T = torch.tensor(0.5)
BUFFER = torch.randn(10)
BAD: dict[str, tuple[str, tuple[Any, ...], dict[str, Any], type[Exception], str]] = {
    "integer weight": ("threshold", (torch.ones(3, dtype=torch.int32), T, 3.0), {}, TypeError, "w must be float16"),
    "sparse weight": ("threshold", (W.to_sparse(), T, 3.0), {}, TypeError, "w must be a dense"),
    "vector t": ("threshold", (W, torch.ones(1), 3.0), {}, ValueError, "t must be a 0-dim"),
    "half t": ("threshold", (W, T.half(), 3.0), {}, TypeError, "t must be torch.float32"),
    "float32 t, float64 w": ("threshold", (W.double(), T, 3.0), {}, TypeError, "t must be torch.float64"),
    "t elsewhere": ("threshold", (W, T.to("meta"), 3.0), {}, ValueError, "t must be on the weight's device"),
    "power below one": ("threshold", (W, T, 0.5), {}, ValueError, "power must be at least 1.*0.5"),
    "power nan": ("threshold", (W, T, math.nan), {}, ValueError, "power must be at least 1.*nan"),
    "integer out_dtype": ("threshold", (W, T, 3.0), {"out_dtype": torch.int8}, TypeError, "out_dtype must be"),
    "out of another shape": ("threshold.out", (W, T, 3.0), {"out": W.t()}, ValueError, "out must have the weight"),
    "g of another shape": ("scale_pruned_grad", (W[0], W, T, T), {}, ValueError, "g must have the weight's shape"),
    "float grad_scale dtype": ("scale_pruned_grad", (W, W, T, T.double()), {}, TypeError, "grad_scale must be"),
    "no weights": ("magnitude_select", ([], [], torch.tensor([0])), {}, ValueError, "at least one tensor"),
    "mixed with float64": (
        "magnitude_select",
        ([W, W.double()], [0, 0], torch.tensor([0])),
        {},
        TypeError,
        "all float64 or none.*index 1",
    ),
    "group out of range": ("magnitude_select", ([W], [1], torch.tensor([0])), {}, ValueError, "groups must be in"),
    "groups too few": ("magnitude_select", ([W, W], [0], torch.tensor([0])), {}, ValueError, "one per weight"),
    "float rank": ("magnitude_select", ([W], [0], torch.tensor([0.0])), {}, TypeError, "rank must be torch.int64"),
    "scales of another length": (
        "magnitude_select",
        ([W], [0], torch.tensor([0])),
        {"scales": torch.ones(2)},
        ValueError,
        r"scales must have shape \(1,\)",
    ),
    "float caps": (
        "magnitude_select",
        ([W], [0], torch.tensor([0])),
        {"caps": torch.ones(1)},
        TypeError,
        "caps must be torch.int64",
    ),
    "hint of another shape": (
        "magnitude_select",
        ([W], [0], torch.tensor([0])),
        {"hint": torch.ones(2)},
        ValueError,
        "hint must be",
    ),
    "hint elsewhere": (
        "magnitude_select",
        ([W], [0], torch.tensor([0])),
        {"hint": torch.ones(1, 2, device="meta")},
        ValueError,
        "hint must be on the weight's device",
    ),
    "overlapping out": ("threshold.out", (BUFFER[:-1], T, 3.0), {"out": BUFFER[1:]}, ValueError, "not overlap it"),
    "too many bits": ("magnitude_histogram", ([W], [0], torch.tensor([0]), 0, 17), {}, ValueError, "bits must be"),
    "shift too large": ("magnitude_histogram", ([W], [0], torch.tensor([0]), 21, 11), {}, ValueError, "shift in"),
    "thresholds too few": ("count_pruned", ([W, W], [T]), {}, ValueError, "thresholds must be one per weight"),
    "count nothing": ("count_pruned", ([], []), {}, ValueError, "at least one tensor"),
}


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("device", ["real", "meta"])
def test_bad_arguments_are_named(case: str, device: str) -> None:
    name, args, kwargs, error, message = BAD[case]
    if device == "meta":
        if case in ("t elsewhere", "sparse weight", "hint elsewhere", "overlapping out"):
            pytest.skip("has no meta form")

        def move(x: Any) -> Any:
            return [move(y) for y in x] if isinstance(x, list) else x.to("meta") if isinstance(x, Tensor) else x

        args, kwargs = tuple(map(move, args)), {key: move(value) for key, value in kwargs.items()}
    with pytest.raises(error, match=message):
        overload(name)(*args, **kwargs)
