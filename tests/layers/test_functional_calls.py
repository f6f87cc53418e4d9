"""torch.func on a live model uses the thresholds of the weights in the call, or raises an error that says why not."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, stack_module_state, vmap
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack

import feather_kernels as fk


def linear(scale: float = 1.0, **options: Any) -> tuple[nn.Module, fk.Sparsifier]:
    model = nn.Linear(8, 4)
    model.weight.data.mul_(scale)
    return model, fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.6), **options)


def x() -> Tensor:
    return torch.randn(3, 8, generator=torch.Generator().manual_seed(0))


def reference(weight: Tensor, bias: Tensor, scale: float = 1.0) -> Tensor:
    t = fk.functional.magnitude_threshold(weight.detach(), 0.6)
    return F.linear(x(), fk.functional.threshold(weight, t, grad_scale=scale), bias)


def parameters_of(model: nn.Module, factor: float = 1.0) -> dict[str, Tensor]:
    return {name: factor * p.detach() for name, p in model.named_parameters()}


def test_a_functional_call_has_thresholds_of_its_own_weights() -> None:
    model, _ = linear()
    before = model(x())
    other = {"weight": torch.randn(4, 8) * 5, "bias": torch.ones(4)}
    assert functional_call(model, other, (x(),)).equal(reference(**other))
    assert model(x()).equal(before)
    members = [linear(scale)[0] for scale in (1, 5)]
    for member in members:
        assert functional_call(model, parameters_of(member), (x(),)).equal(member(x()))
        assert functional_call(model, dict(member.named_parameters()), (x(),)).equal(member(x()))
    assert model(x()).equal(before)


@pytest.mark.parametrize("factor", [1.0, 5.0], ids=["own weights", "others"])
@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_gradients_through_transforms(factor: float, scale: float) -> None:
    model, _ = linear(grad_scale=scale)
    parameters = parameters_of(model, factor)
    weight = parameters["weight"].clone().requires_grad_()
    reference(weight, parameters["bias"], scale).square().sum().backward()

    def loss(p: Any, x: Tensor) -> Tensor:
        return functional_call(model, p, (x,)).square().sum()

    torch.testing.assert_close(grad(loss)(parameters, x())["weight"], weight.grad)
    each = vmap(grad(loss), in_dims=(None, 0))(parameters, x())["weight"]
    assert each.shape == (3, 4, 8)
    torch.testing.assert_close(each.sum(0), weight.grad)
    _, tangent = jvp(lambda x: functional_call(model, parameters, (x,)), (x(),), (torch.ones(3, 8),))
    t = fk.functional.magnitude_threshold(parameters["weight"], 0.6)
    torch.testing.assert_close(tangent, F.linear(torch.ones(3, 8), fk.functional.threshold(parameters["weight"], t)))


def test_transforms_after_the_optimizer_has_moved_the_weights() -> None:
    model, _ = linear()
    model(x())
    with torch.no_grad():
        model.weight.copy_(torch.randn(4, 8) * 3)
    wanted = reference(*(p.detach() for p in model.parameters()))
    assert vmap(model)(x()).allclose(wanted)
    assert functional_call(model, parameters_of(model), (x(),)).equal(wanted)


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_fast_weights_of_meta_learning(scale: float) -> None:
    model, sparsifier = linear(grad_scale=scale)
    latent = dict(model.named_parameters())
    inner = functional_call(model, latent, (x(),)).square().sum()
    gradients = torch.autograd.grad(inner, list(latent.values()), create_graph=True)
    fast = {name: p - 0.1 * g for (name, p), g in zip(latent.items(), gradients, strict=True)}
    functional_call(model, fast, (x(),)).square().sum().backward()

    weight, bias = (p.detach().clone().requires_grad_() for p in latent.values())
    inner = reference(weight, bias, scale).square().sum()
    g_weight, g_bias = torch.autograd.grad(inner, [weight, bias], create_graph=True)
    reference(weight - 0.1 * g_weight, bias - 0.1 * g_bias, scale).square().sum().backward()
    torch.testing.assert_close(model.weight.grad, weight.grad)
    sparsifier.step()


def test_only_lent_thresholds_count_as_a_training_forward() -> None:
    model, sparsifier = linear()
    fast = {name: p * 2 for name, p in model.named_parameters()}
    functional_call(model, fast, (x(),)).sum().backward()
    sparsifier.step()


@pytest.mark.parametrize("base", ["member", "meta"])
def test_a_batch_of_weights_is_refused(base: str) -> None:
    members = [linear(scale)[0] for scale in (1, 5)]
    parameters, buffers = stack_module_state(members)
    model = members[0] if base == "member" else copy.deepcopy(members[0]).to("meta")
    before = [member(x()) for member in members]
    data = x()
    with pytest.raises(RuntimeError, match=r"cannot run on a batch of weights.*finalize\(\) a copy of each"):
        vmap(lambda p, b: functional_call(model, (p, b), (data,)))(parameters, buffers)
    assert all(member(x()).equal(y) for member, y in zip(members, before, strict=True))


def test_weights_without_memory_get_thresholds_of_the_real_ones() -> None:
    """PyTorch's recipe for ensembles, one member at a time."""
    members = [linear(scale, grad_scale=0.5)[0] for scale in (1, 5)]
    base = copy.deepcopy(members[0]).to("meta")
    for member in members:
        parameters = {name: p.detach().requires_grad_() for name, p in member.named_parameters()}
        y = functional_call(base, parameters, (x(),))
        assert y.equal(member(x()))
        y.sum().backward()
        member(x()).sum().backward()
        torch.testing.assert_close(parameters["weight"].grad, member.weight.grad)


class Recursive(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.fails = nn.Linear(8, 8), False

    def forward(self, x: Tensor, depth: int = 1) -> Tensor:
        if self.fails:
            raise KeyError("user error")
        return self.linear(self(x, depth - 1) if depth else x)


def test_a_forward_inside_a_forward_gives_the_thresholds_back_in_order() -> None:
    model = Recursive()
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.6))
    before = model(x())
    functional_call(model, parameters_of(model, 5.0), (x(),))
    assert model(x()).equal(before)
    for _ in range(2):
        with torch.no_grad():
            model.linear.weight.mul_(1.5)
        sparsifier.step()
        assert sparsifier.threshold.equal(fk.functional.magnitude_threshold(model.linear.weight, 0.6))


def test_an_error_of_the_users_forward_stays_that_error() -> None:
    model = Recursive()
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.6))
    own = sparsifier.threshold
    model.fails = True
    with pytest.raises(KeyError, match="user error"):
        functional_call(model, parameters_of(model, 5.0), (x(),))
    assert sparsifier.threshold is own
    assert not _get_current_function_mode_stack()


def test_an_interrupt_in_a_functional_call_is_cleaned_up_by_the_next_forward() -> None:
    model, sparsifier = linear()
    before = model(x())

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    handle = model.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        functional_call(model, parameters_of(model, 5.0), (x(),))
    handle.remove()
    assert model(x()).equal(before)
    sparsifier.step()
