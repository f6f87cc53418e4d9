"""The differentiable threshold: gradients, what is saved, double backward, torch.func, torch.compile, errors."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.utils._python_dispatch import TorchDispatchMode

import feather_kernels as fk
from feather_kernels.autograd.threshold import scale_pruned_grad
from feather_kernels.functional import magnitude_threshold, sparse_conv1d, sparse_linear, threshold


class Launches(TorchDispatchMode):
    """Names of the ops that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def expected_gradient(w: torch.Tensor, t: float, scale: float, g: torch.Tensor) -> torch.Tensor:
    return torch.where((w.detach().abs() <= t) & (t > 0), g * scale, g)


@pytest.mark.parametrize("scale", [1.0, 0.5, 0.0, 2.0])
@pytest.mark.parametrize("power", [1, 2, 3, 4.5, math.inf])
@pytest.mark.parametrize("t", [0.7, 0.0, -1.0])
def test_gradient_is_straight_through(t: float, power: float, scale: float) -> None:
    w = torch.randn(40, 30, requires_grad=True)
    g = torch.randn(40, 30)
    threshold(w, torch.tensor(t), power, scale).backward(g)  # a tensor may be negative
    assert w.grad is not None
    assert w.grad.equal(expected_gradient(w, t, scale, g))


def test_expanded_gradient() -> None:
    w = torch.randn(40, 30, requires_grad=True)
    threshold(w, 0.7, grad_scale=0.5).sum().backward()
    assert w.grad is not None
    assert w.grad.equal(expected_gradient(w, 0.7, 0.5, torch.ones(40, 30)))


def test_saves_nothing_but_the_weight_and_its_threshold() -> None:
    w, t, half = torch.randn(50, requires_grad=True), torch.tensor(0.5), torch.tensor(0.5)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        threshold(w, t, grad_scale=half)
        assert {x.data_ptr() for x in saved} == {w.data_ptr(), t.data_ptr(), half.data_ptr()}
        saved.clear()
        threshold(w, t)
        assert not saved


def test_backward_at_scale_one_launches_nothing() -> None:
    w, g = torch.randn(50, requires_grad=True), torch.randn(50)
    y = threshold(w, 0.5)
    with Launches() as mode:
        (grad,) = torch.autograd.grad(y, w, g)
    assert [name for name in mode.names if "detach" not in name] == []
    assert grad.data_ptr() == g.data_ptr()


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_low_precision_output_and_gradient_in_the_weights_dtype(scale: float) -> None:
    w = torch.randn(500, requires_grad=True)
    y = threshold(w, 0.5, grad_scale=scale, out_dtype=torch.bfloat16)
    assert y.dtype == torch.bfloat16
    assert y.equal(threshold(w, 0.5).bfloat16())
    g = torch.randn(500).bfloat16()
    y.backward(g)
    assert w.grad is not None
    assert w.grad.dtype == torch.float32
    assert w.grad.equal(expected_gradient(w, 0.5, scale, g.float()))


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_double_backward(scale: float) -> None:
    w = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    g = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    (gw,) = torch.autograd.grad(threshold(w, 0.5, grad_scale=scale), w, g, create_graph=True)
    (gg,) = torch.autograd.grad(gw, g, torch.ones_like(gw), create_graph=True)
    assert gg.equal(expected_gradient(w, 0.5, scale, torch.ones_like(gw)))
    # a gradient penalty: d/dw of |dL/dw|^2 with L = sum(P(w)^2) / 2, where dL/dw = m P(w) and dP/dw is m again
    y = threshold(w, 0.5, grad_scale=scale)
    (gw,) = torch.autograd.grad(y.square().sum() / 2, w, create_graph=True)
    (penalty,) = torch.autograd.grad(gw.square().sum() / 2, w)
    mask = expected_gradient(w, 0.5, scale, torch.ones_like(w))
    torch.testing.assert_close(penalty, mask**3 * y.detach())


def test_gradient_of_the_backward_is_linear() -> None:
    w, g = torch.randn(8).double(), torch.randn(8).double().requires_grad_()
    t, half = torch.tensor(0.5).double(), torch.tensor(0.5).double()
    assert torch.autograd.gradcheck(lambda g: scale_pruned_grad(g, w, t, half), (g,))
    assert torch.autograd.gradgradcheck(lambda g: scale_pruned_grad(g, w, t, half), (g,))


def test_torch_func() -> None:
    w = torch.randn(20)

    def loss(w: torch.Tensor) -> torch.Tensor:
        return threshold(w, 0.5, grad_scale=0.5).square().sum() / 2

    expected = expected_gradient(w, 0.5, 0.5, threshold(w, 0.5))
    assert torch.func.grad(loss)(w).equal(expected)
    stacked = torch.stack([w, 2 * w])
    per_row = torch.func.vmap(torch.func.grad(loss))(stacked)
    assert per_row[0].equal(expected)
    assert torch.func.jvp(loss, (w,), (stacked[1],))[1].item() == pytest.approx((expected @ stacked[1]).item())
    assert torch.func.vmap(torch.func.jacfwd(loss))(stacked)[0].allclose(expected)


@pytest.mark.parametrize("scale", [1.0, 0.5])
@pytest.mark.parametrize("out_dtype", [None, torch.float64])
def test_forward_mode(scale: float, out_dtype: torch.dtype | None) -> None:
    """The tangent is scaled as the gradient is; in no_grad mode too, where no graph is."""
    w, tangent = torch.randn(2, 30)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(w, tangent)
        for mode in (torch.enable_grad(), torch.no_grad()):
            with mode:
                y = forward_ad.unpack_dual(threshold(dual, 0.5, grad_scale=scale, out_dtype=out_dtype))
            assert y.primal.equal(threshold(w, 0.5, out_dtype=out_dtype))
            assert y.tangent.equal(expected_gradient(w, 0.5, scale, tangent).to(y.primal.dtype))


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_without_recompiling_as_the_threshold_moves(compiler: str) -> None:
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(compiler)

    def loss(w: torch.Tensor, t: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return threshold(w, t, grad_scale=scale).square().sum() / 2

    compiled = torch.compile(loss, fullgraph=True, backend=counter)
    w, t, scale = torch.randn(64, 8, requires_grad=True), torch.zeros(()), torch.ones(())
    for step in range(20):
        t.fill_(step * 0.05)
        scale.fill_(1 - step * 0.05)
        w.grad = None
        compiled(w, t, scale).backward()
        assert w.grad is not None
        assert w.grad.equal(expected_gradient(w, t.item(), scale.item(), threshold(w, t).detach()))
    assert counter.frame_count == 1


def test_weight_or_threshold_modified_before_backward() -> None:
    for modify in (0, 1):
        w, t = torch.randn(5, requires_grad=True), torch.tensor(0.5)
        y = threshold(w, t, grad_scale=0.5).sum()
        with torch.no_grad():
            (w, t)[modify].add_(0.1)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            y.backward()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda w: threshold(w, torch.tensor(0.5, requires_grad=True)), ValueError, "threshold must not require grad"),
        (
            lambda w: threshold(w, 0.5, grad_scale=torch.tensor(0.5, requires_grad=True)),
            ValueError,
            "grad_scale must not require grad",
        ),
        (lambda w: threshold(w, 0.5, power=0.9), ValueError, r"power must be at least 1.*got 0\.9"),
        (lambda w: threshold(w, 0.5, grad_scale=-0.1), ValueError, r"grad_scale must be .*got -0\.1"),
        (lambda w: threshold(w, 0.5, grad_scale=math.nan), ValueError, r"grad_scale must be .*got nan"),
        (lambda w: threshold(w, torch.zeros(2)), ValueError, "threshold must be a 0-dim"),
        (lambda w: threshold(w.long(), 0.5), TypeError, "weight must be float16"),
        (lambda w: threshold(w, -0.5), ValueError, r"^threshold must be at least 0, got -0\.5$"),
        (lambda w: threshold(w, math.nan), ValueError, "^threshold must be at least 0, got nan$"),
        (lambda w: threshold(w, "0.5"), TypeError, "^threshold must be a number or a 0-dim tensor, got str$"),
        (lambda w: threshold(w, w.numpy()), TypeError, r"^threshold must be a number or .*, got numpy\.ndarray$"),
        (lambda w: threshold(w, None), TypeError, "^threshold must be a number or a 0-dim tensor, got None$"),
        (lambda w: threshold(w.numpy(), 0.5), TypeError, r"^weight must be a torch\.Tensor, got numpy\.ndarray$"),
        (lambda w: threshold([1.0], 0.5), TypeError, r"^weight must be a torch\.Tensor, got list$"),
        (lambda w: threshold(w, 0.5, out_dtype="half"), TypeError, "^out_dtype must be float16.*got half$"),
        (lambda w: sparse_linear([1.0], w, 0.5), TypeError, r"^x must be a torch\.Tensor, got list$"),
        (
            lambda w: sparse_linear(w, w.numpy(), 0.5),
            TypeError,
            r"^weight must be a torch\.Tensor, got numpy\.ndarray$",
        ),
        (lambda w: sparse_linear(w, w[None], 0.5, 3), TypeError, r"^bias must be a torch\.Tensor, got int$"),
        (lambda w: sparse_conv1d(None, w[None, None], 0.5), TypeError, r"^x must be a torch\.Tensor, got None$"),
        (lambda w: sparse_conv1d(w[None], w.numpy(), 0.5), TypeError, r"^weight must be a .*, got numpy\.ndarray$"),
        (
            lambda w: magnitude_threshold({"w": w}, 0.5),
            TypeError,
            r"^weights must be a tensor or a sequence of tensors, got dict: pass its values\(\)$",
        ),
        (
            lambda w: magnitude_threshold(torch.nn.Linear(2, 2), 0.5),
            TypeError,
            r"^weights must be .*, got torch\.nn\.modules\.linear\.Linear: pass its parameters\(\)$",
        ),
        (lambda w: magnitude_threshold(3, 0.5), TypeError, "^weights must be a tensor or a sequence .*, got int$"),
        (lambda w: magnitude_threshold([w, None], 0.5), TypeError, r"^weights\[1\] must be a .*Tensor, got None$"),
        (lambda w: magnitude_threshold(w.long(), 0), TypeError, r"^weights\[0\] must be float16.*got torch\.int64$"),
        (lambda w: magnitude_threshold(w, "0.5"), TypeError, "^sparsity must be a number, got '0.5'$"),
        (
            lambda w: magnitude_threshold(w, 95),
            ValueError,
            r"^sparsity must be in \[0, 1\), got 95 \(a fraction of zeros, not a percentage: 0\.95\)$",
        ),
        (lambda w: magnitude_threshold(w, 100), ValueError, r"got 100 \(a fraction of zeros, not a percentage\)$"),
        (lambda w: magnitude_threshold(w, 1.0), ValueError, r"sparsity must be in \[0, 1\), got 1.0$"),
        (lambda w: magnitude_threshold(w, -0.1), ValueError, r"sparsity must be in \[0, 1\), got -0.1"),
        (lambda w: magnitude_threshold([], 0.5), ValueError, "weights must hold at least one element"),
        (lambda w: magnitude_threshold([w[:0]], 0.5), ValueError, "weights must hold at least one element"),
    ],
)
def test_bad_arguments(call: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call(torch.randn(4))


def test_public_names() -> None:
    for name in fk.__all__:
        assert getattr(fk, name) is not None
