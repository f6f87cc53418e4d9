"""Functions call ops by the shortest way, and by the dispatcher wherever something may be listening."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

import feather_kernels as fk
from feather_kernels.ops import calls, eager, schema

OPS = ("threshold", "threshold_recompute", "scale_pruned_grad_")  # of one step of a sparse layer


def sparse_layer(layer: nn.Linear | nn.Conv1d | None = None) -> nn.Linear | nn.Conv1d:
    """One sparse layer of a model."""
    model = nn.Sequential(layer or nn.Linear(6, 5))
    fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.5), grad_scale=0.5)
    return model[0]


def step(layer: nn.Linear | nn.Conv1d) -> Tensor:
    """Forward and backward; the gradient of the weight."""
    layer.weight.grad = None
    layer(torch.ones(3, *layer.weight.shape[1:], requires_grad=True)).sum().backward()
    assert layer.weight.grad is not None
    return layer.weight.grad


class Listener(TorchDispatchMode):
    """Notes the ops."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


SHORT = ("STRAIGHT",)  # the ways past the dispatcher


def forbid(monkeypatch: pytest.MonkeyPatch, *ways: str) -> None:
    """From here on a call by these ways fails."""

    def fail(*args: Any, **options: Any) -> None:
        raise AssertionError(f"one of {ways}: called with {len(args)} arguments and {options}")

    for way in ways:
        monkeypatch.setattr(calls, way, calls.Way(*[fail] * len(calls.Way._fields)))


def note_calls(monkeypatch: pytest.MonkeyPatch, way: str, op: str) -> list[tuple[int, Any]]:
    """From here on of each call of that op by that way the number of arguments, and out_dtype."""
    noted: list[tuple[int, Any]] = []
    real = getattr(getattr(calls, way), op)

    def note(*args: Any, **options: Any) -> Any:
        noted.append((len(args), options.get("out_dtype")))
        return real(*args, **options)

    monkeypatch.setattr(calls, way, getattr(calls, way)._replace(**{op: note}))
    return noted


@pytest.fixture(params=SHORT)
def short_way(request: pytest.FixtureRequest) -> str:
    """The way that plain tensors take."""
    w = torch.ones(3)
    assert calls.way(w, torch.tensor(0.5)) is getattr(calls, request.param)
    return request.param


@pytest.mark.parametrize("dense", [nn.Linear(6, 5), nn.Conv1d(6, 5, 2)], ids=["linear", "convolution"])
def test_no_dispatch_where_nothing_listens(
    dense: nn.Linear | nn.Conv1d, short_way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = sparse_layer(copy.deepcopy(dense))
    with profile(activities=[ProfilerActivity.CPU]):  # by the dispatcher
        expected = step(layer)
    forbid(monkeypatch, "DISPATCHED", *(way for way in SHORT if way != short_way))
    assert step(layer).equal(expected)


def test_a_backend_that_cannot_run_is_the_ops_to_report() -> None:
    """Which looks at the arguments first, and needs none for an empty weight."""
    t = torch.tensor(0.5)
    with fk.use_backend("cuda"):
        assert fk.functional.threshold(torch.ones(0, 3), t).shape == (0, 3)
        with pytest.raises(TypeError, match="must be float16"):
            fk.functional.threshold(torch.ones(3, dtype=torch.int32), t)
        with pytest.raises(fk.BackendUnavailableError, match="runs CUDA tensors only"):
            fk.functional.threshold(torch.ones(3), t)


OPS_OF_WAYS = {  # arguments of a call
    "threshold": ("w", "t", 3.0),
    "threshold_recompute": ("w", "t", 3.0, "g"),
    "scale_pruned_grad": ("g", "w", "t", "scale"),
    "scale_fresh_grad_": ("g", "w", "t", "scale"),
}


LAYOUTS: dict[str, Callable[[], Tensor]] = {  # of weights and gradients
    "row-major": lambda: torch.randn(6, 5),
    "transposed": lambda: torch.randn(5, 6).t(),
    "gaps": lambda: torch.randn(6, 7)[:, 1:6],
}


def arguments_of(op: str, layout: str) -> tuple[Any, ...]:
    torch.manual_seed(3)
    w, g = LAYOUTS[layout](), LAYOUTS[layout]()
    values = {"w": w, "g": g, "t": torch.tensor(0.5), "scale": torch.tensor(0.25)}
    return tuple(values[a] if isinstance(a, str) else a for a in OPS_OF_WAYS[op])


@pytest.mark.parametrize("out_dtype", [torch.quint8, torch.int64, torch.float8_e4m3fn])
def test_dtypes_that_no_result_has(out_dtype: torch.dtype, short_way: str) -> None:
    w, t = torch.ones(3), torch.tensor(0.5)
    with pytest.raises(TypeError, match="out_dtype must be float16, bfloat16, float32 or float64, got"):
        getattr(calls, short_way).threshold(w, t, 3.0, out_dtype=out_dtype)
    with pytest.raises(TypeError, match="out_dtype must be float16, bfloat16, float32 or float64, got"):
        getattr(calls, short_way).scale_pruned_grad(w, w, t, t, out_dtype=out_dtype)


def test_arguments_that_do_not_fit(short_way: str) -> None:
    w, t, way = torch.randn(5, 6), torch.tensor(0.5), getattr(calls, short_way)
    for wrong, error, message in ((t.double(), TypeError, "t must be"), (t.expand(2), ValueError, "t must be a 0-dim")):
        with pytest.raises(error, match=message):
            way.threshold(w, wrong, 3.0)
        with pytest.raises(error, match=message):
            way.scale_fresh_grad_(torch.ones(5, 6), w, wrong, t)
    with pytest.raises(ValueError, match="g must have the weight's shape"):
        way.scale_fresh_grad_(torch.ones(6, 5), w, t, t)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_call_record_sees_forwards_alone(layout: str, short_way: str) -> None:
    w, t, _, g = arguments_of("threshold_recompute", layout)
    way, record = getattr(calls, short_way), eager.CallRecord()
    record.start()
    way.threshold_recompute(w, t, 3.0, g)
    assert not record.addresses
    way.threshold(w, t, 3.0)
    record.stop()
    assert record.addresses == {t.data_ptr()}


def test_a_dispatch_mode_sees_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = sparse_layer()
    expected = step(layer)
    forbid(monkeypatch, *SHORT)
    with Listener() as listener:
        assert step(layer).equal(expected)
    assert [name for name in listener.seen if name.startswith("feather_kernels")] == [
        f"feather_kernels.{name}.default" for name in OPS
    ]


@pytest.mark.parametrize("listens", [False, True])
def test_from_autograd_straight_to_the_implementation(listens: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    callers = []
    monkeypatch.setattr(schema, "scale_pruned_grad_", lambda *_: callers.append(sys._getframe(2).f_code.co_name))
    tensors = (torch.ones(3), torch.ones(3), torch.tensor(0.5), torch.tensor(0.5))
    with Listener() if listens else nullcontext():
        torch.ops.feather_kernels.scale_pruned_grad_(*tensors)
    assert len(callers) == 1
    assert (callers == ["autograd_kernel"]) == (not listens)


def test_the_profiler_names_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = sparse_layer()
    forbid(monkeypatch, *SHORT)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step(layer)
    assert {f"feather_kernels::{name}" for name in OPS} <= {event.key for event in profiled.key_averages()}


@pytest.mark.parametrize("pre_dispatch", [False, True])
def test_a_traced_graph_holds_the_op(pre_dispatch: bool) -> None:
    def function(w: Tensor) -> Tensor:
        return fk.functional.threshold(w, torch.tensor(1.0))

    traced = make_fx(function, pre_dispatch=pre_dispatch)(torch.ones(3))
    w = torch.tensor([0.5, 2.0, -3.0])
    assert traced(w).equal(function(w))


def test_a_function_mode_sees_the_ops(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = sparse_layer()
    forbid(monkeypatch, *SHORT)
    with torch.device("cpu"):
        layer(torch.ones(3, 6))


SCALARS = {"t": 1.0, "grad_scale": 0.25}


@pytest.mark.parametrize("name", SCALARS)
def test_lazy_scalars(name: str) -> None:
    """A tensor whose memory holds the negative of its values."""
    values = {own: torch.tensor(value) for own, value in SCALARS.items()}
    w = torch.tensor([0.5, 2.0, -3.0], requires_grad=True)
    results = []
    for scalars in (values, {**values, name: torch._neg_view(-values[name])}):
        w.grad = None
        y = fk.functional.threshold(w, scalars["t"], grad_scale=scalars["grad_scale"])
        y.sum().backward()
        results.append((y, w.grad))
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


def test_a_lazy_zero_as_threshold() -> None:
    w = torch.tensor([0.5, 2.0, -3.0])
    zero = torch._efficientzerotensor(())
    assert calls.way(w, zero).threshold(w, zero, 2.0).equal(w)


def meta() -> Tensor:
    return torch.empty(3, 2, device="meta")


def subclass() -> Tensor:
    class Wrapped(Tensor):
        pass

    return torch.ones(3, 2).as_subclass(Wrapped)


def negated() -> Tensor:
    return torch.full((3, 2), 1j).conj().imag


def zeros() -> Tensor:
    return torch._efficientzerotensor((3, 2))


def part_of_zeros() -> Tensor:
    """Its address is not null."""
    return torch._efficientzerotensor((5, 2))[2:]


def part_of_functional() -> Tensor:
    return torch._to_functional_tensor(torch.ones(5, 2)[2:])


@pytest.mark.usefixtures("short_way")
@pytest.mark.parametrize("make", [meta, subclass, negated, zeros, part_of_zeros, part_of_functional])
def test_other_tensors_get_the_op(make: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    w = make()
    t = torch.tensor(0.5, device=w.device)
    dispatched = note_calls(monkeypatch, "DISPATCHED", "threshold")
    y = calls.way(w, t).threshold(w, t, 3.0)
    assert dispatched == [(3, None)]
    assert (y.shape, y.device) == (w.shape, w.device)
    assert w.is_meta or y.allclose(w * (1 - 0.125) ** (1 / 3))


@pytest.mark.usefixtures("short_way")
def test_a_gradient_that_is_part_of_a_lazy_zero() -> None:
    w = torch.tensor([0.25, 2.0, -3.0], requires_grad=True)
    y = fk.functional.threshold(w, torch._efficientzerotensor(2)[1], grad_scale=torch.tensor(0.5))
    y.backward(torch._efficientzerotensor(4)[1:])
    assert y.equal(w)
    assert w.grad is not None
    assert not w.grad.any()


def test_wrapped_tensors_behind_a_transform_get_the_op() -> None:
    """In ``vjp_fn`` the transform has ended, and what was saved for backward is still wrapped by it."""
    layer, x, w, t = sparse_layer(), torch.ones(3, 6), torch.tensor([0.2, -2.0]), torch.tensor(0.5)
    scale = torch.tensor(0.25)
    _, of_weight = torch.func.vjp(lambda w: fk.functional.threshold(w, t, grad_scale=scale), w)
    _, of_input = torch.func.vjp(layer, x)
    with torch.no_grad():
        assert of_weight(torch.ones(2))[0].tolist() == [0.25, 1.0]
        (gradient,) = of_input(torch.ones(3, 5))
    assert gradient.allclose(layer.sparse_weight().sum(0).expand(3, 6))


@pytest.mark.usefixtures("short_way")
def test_gradients_under_vmap_get_the_op(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(4, requires_grad=True)
    y = fk.functional.threshold(weight, torch.tensor(0.3), grad_scale=torch.tensor(0.5))
    dispatched = note_calls(monkeypatch, "DISPATCHED", "scale_pruned_grad")
    (rows,) = torch.autograd.grad(y, weight, torch.eye(4), is_grads_batched=True)
    assert dispatched == [(4, torch.float32)]
    assert rows.diagonal().equal(torch.where(weight.abs() <= 0.3, 0.5, 1.0))
