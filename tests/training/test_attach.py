"""attach() steps with the optimizer; detach() gives the dense model back."""

from __future__ import annotations

import contextlib
import copy
import gc
import linecache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import feather_kernels as fk
from tests.support import nets
from tests.support.no_host_read import NoHostRead


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


# ------------------------------------------------------------------------------------------------ wrappers, mistakes


def step_twice(sam: Any, model: nn.Module) -> None:
    """As SAM's authors write it: two forwards, two halves of a step."""
    backward(model)
    sam.first_step()
    backward(model)
    sam.second_step()


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation in the shape that most repositories have: a base optimizer, two half steps."""

    def __init__(self, params: Any, base_class: Any, **options: Any) -> None:
        super().__init__(params, {})
        self.base_optimizer = base_class(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["e"] = 0.05 * p.grad / (p.grad.norm() + 1e-12)
                p.add_(self.state[p]["e"])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.state[p]["e"])
        self.base_optimizer.step()
        self.zero_grad()

    def step(self, closure: Any = None) -> None:
        self.first_step()
        closure()
        self.second_step()


class Wrapper:
    """As Lightning's: no Optimizer itself, holds one."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


def test_wrappers_are_looked_into() -> None:
    for wrap in (Wrapper, lambda optimizer: Wrapper(Wrapper(optimizer))):
        model = nets.conv_net()
        sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        sparsifier.attach(wrap(optimizer))
        backward(model)
        optimizer.step()
        assert sparsifier.step_count == 1


def test_accelerates_optimizer_is_looked_into() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = nets.conv_net()
    model, optimizer = accelerate.Accelerator(cpu=True).prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=4)
    sparsifier.attach(optimizer)
    for _ in range(2):
        backward(model)
        optimizer.step()
    assert sparsifier.step_count == 2
    assert sparsifier.sparsity == 0.8


@pytest.mark.parametrize("halves", [True, False])
def test_sam_counts_whole_steps(halves: bool) -> None:
    model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=6)
    sam = SAM(model.parameters(), torch.optim.SGD, lr=0.05)
    sparsifier.attach(sam)
    for _ in range(5):
        if halves:
            step_twice(sam, model)
        else:
            backward(model)
            sam.step(lambda: backward(model))
    assert sparsifier.step_count == 5
    wanted = fk.functional.magnitude_threshold(nets.prunable(model), 0.8)
    assert sparsifier.threshold.equal(wanted)


def test_a_second_counter_is_an_error() -> None:
    model, sparsifier, optimizer, handle = attached()
    backward(model)
    optimizer.step()
    with pytest.raises(RuntimeError, match=r"called by the optimizer .* attached to.*remove\(\) the handle"):
        sparsifier.step()
    assert sparsifier.step_count == 1
    handle.remove()
    sparsifier.step()
    assert sparsifier.step_count == 2


def test_an_optimizer_that_has_gone_is_no_counter() -> None:
    model, sparsifier, optimizer, _ = attached()
    del optimizer
    gc.collect()
    backward(model)
    sparsifier.step()
    assert sparsifier.step_count == 1


LINE_OF_THE_CALL = "model(nets.images() if x is None else x).square().mean().backward()"


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, x: torch.Tensor | None = None) -> None:
    for _ in range(steps):
        model(nets.images() if x is None else x).square().mean().backward()
        optimizer.step()


def test_weights_that_move_while_the_attached_optimizer_rests_are_noticed() -> None:
    model, sparsifier, _, _ = attached()
    other = torch.optim.AdamW(model.parameters())
    with pytest.warns(fk.SparsityWarning, match=r"attached to has not stepped") as record:
        train(model, other, 101)
    assert [linecache.getline(w.filename, w.lineno).strip() for w in record] == [LINE_OF_THE_CALL]
    assert sparsifier.step_count == 0
    with pytest.warns(fk.SparsityWarning, match="counted 0 steps, and its schedule ends at step 5"):
        sparsifier.finalize()


def test_a_training_that_never_steps_is_noticed() -> None:
    model = nn.Linear(4, 4)
    fk.Sparsifier(model, sparsity=0.8, total_steps=10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    train(model, optimizer, 100, torch.randn(2, 4))
    with pytest.warns(fk.SparsityWarning, match=r"step\(\) has not been called") as record:
        train(model, optimizer, 100, torch.randn(2, 4))
    assert len(record) == 1


def test_evaluation_and_loading_are_no_training_without_steps() -> None:
    model, sparsifier, optimizer, _ = attached()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(6):
        model.load_state_dict(state)
        with torch.no_grad():
            model.eval()(nets.images())
        model.train()
    backward(model)
    optimizer.step()
    assert sparsifier.step_count == 1


def test_skipped_steps_are_not_read_on_the_host_where_steps_are_counted_on_the_device() -> None:
    model = nets.conv_net()
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=10, capturable=True)
    optimizer = SkipsByItself(model.parameters(), lr=0.05)
    sparsifier.attach(optimizer)
    counts = []
    for infinite in (0.0, 1.0, 0.0):
        backward(model)
        optimizer.found_inf, optimizer.grad_scale = torch.tensor(infinite), torch.tensor(1.0)
        with NoHostRead():
            optimizer.step()
        counts.append(sparsifier.step_count)
    assert counts == [1, 1, 2]


class Outer(torch.optim.SGD):
    """An optimizer that extends another: torch runs the hooks for both calls."""

    fails = False

    def step(self, closure: Any = None) -> None:
        if self.fails:
            raise ValueError("no step")
        super().step()
        with torch.no_grad():
            self.param_groups[0]["params"][0].mul_(0.9)


def test_a_step_that_calls_another_counts_once() -> None:
    model = nets.conv_net()
    torch.optim.SGD(model.parameters(), lr=0.1)  # torch puts hooks around a class's step when one is made
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=10)
    optimizer = Outer(model.parameters(), lr=0.1)
    sparsifier.attach(optimizer)
    counts = []
    for fails in (False, True, False, True, False):
        optimizer.fails = fails
        backward(model)
        with contextlib.suppress(ValueError):
            optimizer.step()
        counts.append(sparsifier.step_count)
    assert counts == [1, 1, 2, 2, 3]
    assert sparsifier.threshold.equal(fk.functional.magnitude_threshold(nets.prunable(model), sparsifier.sparsity))
