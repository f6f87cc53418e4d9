"""attach(): stepping with the optimizer; detach(): the dense model back."""

from __future__ import annotations

import copy
from typing import Any

import nets
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import feather_kernels as fk


def attached(**options: Any) -> tuple[nn.Module, fk.Sparsifier, torch.optim.Optimizer, Any]:
    model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=10, **options)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return model, sparsifier, optimizer, sparsifier.attach(optimizer)


def backward(model: nn.Module) -> None:
    F.cross_entropy(model(nets.images()), torch.arange(8)).backward()


def test_attached_sparsifier_steps_by_itself() -> None:
    model, sparsifier, optimizer, handle = attached()
    by_hand = nets.conv_net()
    reference = fk.Sparsifier(by_hand, sparsity=0.8, total_steps=10)
    other = torch.optim.SGD(by_hand.parameters(), lr=0.05)
    for step in range(1, 7):
        for net, opt in ((model, optimizer), (by_hand, other)):
            opt.zero_grad()
            backward(net)
            opt.step()
        reference.step()
        assert sparsifier.step_count == step
        assert sparsifier.threshold.equal(reference.threshold)
    handle.remove()
    optimizer.step()
    assert sparsifier.step_count == 6


@pytest.mark.filterwarnings("ignore:the sparsifier has counted:feather_kernels.SparsityWarning")
@pytest.mark.parametrize("end", ["finalize", "detach"])
def test_the_end_removes_the_hook(end: str) -> None:
    model, sparsifier, optimizer, _ = attached()
    backward(model)
    optimizer.step()
    getattr(sparsifier, end)()
    optimizer.step()  # would raise if the hook were still there
    assert not optimizer._optimizer_step_post_hooks
    with pytest.raises(RuntimeError, match=f"attach is not available after {end}"):
        sparsifier.attach(optimizer)


class SkipsByItself(torch.optim.Optimizer):
    """Like the fused optimizers: GradScaler always calls step() and passes found_inf as an attribute."""

    _step_supports_amp_scaling = True

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(torch.where(self.found_inf > 0, 0.0, p.grad / self.grad_scale), alpha=-group["lr"])


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, SkipsByItself])
def test_steps_that_a_grad_scaler_skips_do_not_count(optimizer_class: Any) -> None:
    model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=10)
    optimizer = optimizer_class(model.parameters(), lr=0.05)
    sparsifier.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    counts, before = [], None
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(nets.images()), torch.arange(8))).backward()
        if step in (1, 2):
            model[0].weight.grad[0] = float("inf")
            before = model[0].weight.clone()
        scaler.step(optimizer)
        scaler.update()
        if step in (1, 2):
            assert model[0].weight.equal(before)
        counts.append(sparsifier.step_count)
    assert counts == [1, 1, 1, 2]


def test_fused_adamw_under_a_grad_scaler() -> None:
    model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=10)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    sparsifier.attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    counts = []
    for infinite in (False, True, False):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(model(nets.images()), torch.arange(8))).backward()
        if infinite:
            model[8].weight.grad.fill_(float("inf"))
        scaler.step(optimizer)
        scaler.update()
        counts.append(sparsifier.step_count)
    assert counts == [1, 1, 2]
    assert all(p.isfinite().all() for p in model.parameters())


def test_a_copy_is_not_attached() -> None:
    model, sparsifier, optimizer, _ = attached()
    twin = copy.deepcopy(sparsifier)
    backward(model)
    optimizer.step()
    assert (sparsifier.step_count, twin.step_count) == (1, 0)


@pytest.mark.parametrize("options", [{}, {"scope": "layer"}, {"min_density": 0.1, "score_scale": "l2"}])
def test_detach_gives_the_dense_model_back_untouched(options: dict[str, Any]) -> None:
    model, sparsifier, optimizer, _ = attached(**options)
    for _ in range(6):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    assert sparsifier.report().zeros > 0
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = list(model.parameters())
    assert sparsifier.detach() is model
    assert [type(m) for m in model.modules()] == [type(m) for m in nets.conv_net().modules()]
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))
    assert list(state) == list(model.state_dict())
    for name, value in model.state_dict().items():
        assert value.view(torch.int32 if value.dtype == torch.float32 else value.dtype).equal(
            state[name].view(torch.int32 if value.dtype == torch.float32 else value.dtype)
        )
    dense = nets.conv_net()
    dense.load_state_dict(state)
    assert model.eval()(nets.images()).equal(dense.eval()(nets.images()))
    assert not [key for module in model.modules() for key in vars(module) if "feather" in key]
