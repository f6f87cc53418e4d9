"""The first step names weights that train although the forward of their layer does not run."""

from __future__ import annotations

import linecache
import threading
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import checkpoint

import feather_kernels as fk


def sparse(model: nn.Module, **options: Any) -> fk.Sparsifier:
    return fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.9), **options)


class LanguageModel(nn.Module):
    """In training a fused loss takes the weight of the head; in evaluation the head is called."""

    def __init__(self, read: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head = nn.Linear(16, 16), nn.Linear(16, 50, bias=False)
        self.read = read or (lambda h, weight: h @ weight.t())

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.read(h, self.head.weight) if self.training else self.head(h)


def x() -> Tensor:
    return torch.randn(8, 16, generator=torch.Generator().manual_seed(0))


# ------------------------------------------------------------------------------------------------ never called


@pytest.mark.filterwarnings("ignore::feather_kernels.SparsityWarning")
@pytest.mark.parametrize("evaluation", [None, "eval", "eval without gradients", "no_grad"])
@pytest.mark.parametrize("cleared", [False, True], ids=["", "after zero_grad"])
def test_a_weight_that_trains_without_its_layer_is_an_error(evaluation: str | None, cleared: bool) -> None:
    model = LanguageModel()
    sparsifier = sparse(model)
    if evaluation is not None:
        with torch.set_grad_enabled(evaluation == "eval"):
            model.train(evaluation == "no_grad")(x()) if evaluation == "no_grad" else model.eval()(x())
    model.train()(x()).square().mean().backward()
    if cleared:
        model.zero_grad()
    with pytest.raises(RuntimeError, match=r"no training forward has called .*: head\..*read_directly"):
        sparsifier.step()
    assert sparsifier.step_count == 0


def test_the_remedies_of_the_error_work() -> None:
    for options in ({"read_directly": ["head"]}, {"ignore": ["head"]}):
        model = LanguageModel()
        sparsifier = sparse(model, **options)
        model(x()).square().mean().backward()
        sparsifier.step()
        assert model.train()(x()).equal(model.eval()(x()))


def test_layers_that_a_step_leaves_out_are_waited_for() -> None:
    model = nn.ModuleDict({"used": nn.Linear(16, 4), "expert": nn.Linear(16, 4)})
    sparsifier = sparse(model)
    for _ in range(3):
        model["used"](x()).sum().backward()
        sparsifier.step()
    F.linear(x(), model["expert"].weight).sum().backward()
    with pytest.raises(RuntimeError, match=r"no training forward has called .*: expert\."):
        sparsifier.step()
    model["expert"](x()).sum().backward()
    sparsifier.step()
    assert sparsifier.step_count == 4


def test_steps_before_any_forward_are_no_error() -> None:
    model = nn.Linear(8, 8)
    sparsifier = sparse(model)
    sparsifier.step()
    model(torch.randn(2, 8)).sum().backward()
    sparsifier.step()
    assert sparsifier.step_count == 2


def test_a_model_may_be_trained_in_eval_mode() -> None:
    model = LanguageModel().eval()
    sparsifier = sparse(model)
    for _ in range(2):
        model(x()).square().mean().backward()
        sparsifier.step()


def test_one_call_will_do_for_a_tied_weight() -> None:
    model = nn.ModuleDict({"a": nn.Linear(16, 16), "b": nn.Linear(16, 16)})
    model["b"].weight = model["a"].weight
    sparsifier = sparse(model)
    model["a"](x()).sum().backward()
    sparsifier.step()


def test_the_error_comes_in_compiled_code_too() -> None:
    model = LanguageModel()
    sparsifier = sparse(model)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x()).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"no training forward has called .*: head\."):
        sparsifier.step()


# ------------------------------------------------------------------------------------------------ called and read


class CalledAndRead(LanguageModel):
    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x)
        return self.head(h) + self.read(h, self.head.weight)


class FusedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, h: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(h, weight)
        return h.matmul(weight.t())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        h, weight = ctx.saved_tensors
        return grad @ weight, grad.t() @ h


def twice(model: nn.Module) -> None:
    for _ in range(2):
        model(x()).square().mean().backward()


READS = {
    "matmul": lambda h, weight: h @ weight.t(),
    ".T": lambda h, weight: h @ weight.T,
    "F.linear": lambda h, weight: F.linear(h, weight),
    "einsum": lambda h, weight: torch.einsum("ni,oi->no", h, weight),
    "a list": lambda h, weight: torch.cat([weight, weight]).sum() + torch.zeros(8, 50),
    "checkpoint": lambda h, weight: checkpoint(lambda h: F.linear(h, weight), h, use_reentrant=False),
    "index": lambda h, weight: h[:, :1] * weight[:, 0],
}


@pytest.mark.parametrize("read", READS)
def test_a_weight_that_is_called_and_read_is_warned_about_where_it_is_read(read: str) -> None:
    model = CalledAndRead(READS[read])
    sparsifier = sparse(model)
    with pytest.warns(fk.SparsityWarning, match=r"head is a sparse layer, .*read_directly=\['head'\]") as record:
        twice(model)
    (warning,) = [w for w in record if w.category is fk.SparsityWarning]
    assert warning.filename == __file__
    assert "weight" in linecache.getline(warning.filename, warning.lineno)
    sparsifier.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x()).square().mean().backward()

    model = CalledAndRead(READS[read])
    sparsifier = sparse(model, read_directly=["head"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x()).square().mean().backward()
    sparsifier.step()


def test_a_fused_loss_of_its_own_function_is_an_error() -> None:
    """torch shows no operands of a Function; the gradient of a layer that did not run tells."""
    model = LanguageModel(FusedLoss.apply)
    sparsifier = sparse(model)
    model(x()).square().mean().backward()
    with pytest.raises(RuntimeError, match=r"no training forward has called .*: head\."):
        sparsifier.step()


def test_reads_of_facts_and_values_without_a_gradient_do_not_count() -> None:
    def read(h: Tensor, weight: Tensor) -> Tensor:
        assert weight.dtype == h.dtype
        assert weight.shape[1] == h.shape[-1]
        assert weight.device == h.device
        weight.requires_grad_()
        with torch.no_grad():
            weight.norm()
        return weight.detach().norm() + weight.data.sum() + weight.numel() * torch.zeros(8, 50)

    model = CalledAndRead(read)
    sparsifier = sparse(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(x()).square().mean().backward()
        model.eval()(x())
    sparsifier.step()


class Inner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.attention = nn.Conv1d(4, 16, 3), nn.MultiheadAttention(16, 2, batch_first=True)
        self.encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.recurrent = nn.LSTM(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x).transpose(1, 2)
        return self.recurrent(self.encoder(self.attention(y, y, y)[0]))[0]


@pytest.mark.parametrize("recompute", [None, True])
@pytest.mark.parametrize("autocast", [False, True])
def test_our_own_layers_are_not_warned_about(recompute: bool | None, autocast: bool) -> None:
    model = Inner()
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.97), recompute=recompute)
    with warnings.catch_warnings():
        warnings.simplefilter("error", fk.SparsityWarning)
        for _ in range(2):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
                y = model(torch.randn(2, 4, 9))
            y.float().sum().backward()
    sparsifier.step()


# ------------------------------------------------------------------------------------------------ the watch itself


def test_the_mode_ends_with_the_forward_also_after_errors_and_interrupts() -> None:
    def read(h: Tensor, weight: Tensor) -> Tensor:
        raise error

    model = CalledAndRead(read)
    sparsifier = sparse(model)
    for error in (ValueError("x"), KeyboardInterrupt()):
        with pytest.raises(type(error)):
            model(x())
    model.read = lambda h, weight: 0.0
    model(x()).sum().backward()
    sparsifier.step()
    assert not _get_current_function_mode_stack()


def test_an_interrupt_is_cleaned_up_even_where_no_step_follows() -> None:
    def read(h: Tensor, weight: Tensor) -> Tensor:
        raise KeyboardInterrupt

    model = CalledAndRead(read)
    sparsifier = sparse(model)
    with pytest.raises(KeyboardInterrupt):
        model(x())
    assert _get_current_function_mode_stack()  # torch runs no hooks then
    with torch.device("meta"):
        sparsifier.detach()
        assert torch.empty(1).device.type == "meta", "the user's mode is still there"
    (blind,) = _get_current_function_mode_stack()
    blind.__exit__(None, None, None)


class Waits(LanguageModel):
    """Without gradients its forward stays inside until it is let go."""

    def __init__(self) -> None:
        super().__init__()
        self.inside, self.go = threading.Event(), threading.Event()

    def forward(self, x: Tensor) -> Tensor:
        h = self.head(self.body(x))
        if torch.is_grad_enabled():
            return h + self.head.weight.sum()
        self.inside.set()
        self.go.wait()
        return h


def test_threads_are_watched_apart() -> None:
    """One evaluates, from before until after the training forward of another."""
    model = Waits()
    sparsifier = sparse(model)

    def evaluate() -> None:
        with torch.no_grad():
            model(x())
        left.extend(_get_current_function_mode_stack())

    left: list[Any] = []
    thread = threading.Thread(target=evaluate)
    thread.start()
    model.inside.wait()
    try:
        with pytest.warns(fk.SparsityWarning, match="head is a sparse layer"):
            model(x()).sum().backward()
        assert len(sparsifier._current_thresholds.watch._record.addresses) == 2
        assert not _get_current_function_mode_stack()
    finally:
        model.go.set()
        thread.join()
    assert not left
    sparsifier.step()


def test_a_term_over_all_parameters_has_a_remedy() -> None:
    for options in ({}, {"read_directly": ["expert"]}):
        model = nn.ModuleDict({"used": nn.Linear(16, 4), "expert": nn.Linear(16, 4)})
        sparsifier = sparse(model, **options)
        (model["used"](x()).sum() + 0 * sum(p.sum() for p in model.parameters())).backward()
        if options:
            sparsifier.step()
        else:
            with pytest.raises(RuntimeError, match=r"expert\. .*term over all Parameters: .*read_directly"):
                sparsifier.step()


def test_training_in_eval_mode_may_call_a_part() -> None:
    model = LanguageModel().eval()
    sparsifier = sparse(model)
    model.body(model.body(model(x())[:, :16])).sum().backward()
    sparsifier.step()


def test_compiled_parts_are_compiled_once() -> None:
    torch._dynamo.reset()
    model = CalledAndRead(lambda h, weight: 0.0)
    sparsifier = sparse(model)
    model.head.compile(backend="aot_eager", fullgraph=True)
    torch._dynamo.utils.counters.clear()
    for _ in range(4):
        model(x()).sum().backward()
        sparsifier.step()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_a_function_compiled_inside_the_forward_still_compiles() -> None:
    compiled = torch.compile(
        lambda h, weight: F.gelu(h).sum() + torch.zeros(8, 50), backend="aot_eager", fullgraph=True
    )
    model = CalledAndRead(compiled)
    sparsifier = sparse(model)
    for _ in range(3):
        model(x()).sum().backward()
        sparsifier.step()
