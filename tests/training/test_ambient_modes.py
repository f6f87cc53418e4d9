"""A model's life under the user's ambient modes gives the same bits as without them, on any default device."""

from __future__ import annotations

import ast
import copy
import os
import pickle
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import feather_kernels as fk
from feather_kernels.backends import device_constants
from feather_kernels.cli.selftest.checks import TESTS
from feather_kernels.sparsify.policies import largest_below
from tests.conftest import CPU, BackendUnderTest, ptx_executor
from tests.support.no_host_read import NoHostRead

PACKAGE = Path(__file__).parents[2] / "feather_kernels"
Mode = Callable[[], AbstractContextManager[Any]]

POLICIES: dict[str, dict[str, Any]] = {
    "global": {},
    "layer, floor": {"scope": "layer", "min_density": 0.1},
    "erk, l2, overrides": {
        "scope": "erk",
        "score_scale": "l2",
        "overrides": {"head": {"sparsity": 0.3}, "convolution": {"grad_scale": 0.25, "power": 2.0}},
    },
    "fan, floor, changing scale": {"score_scale": "fan", "min_density": 0.05, "grad_scale": lambda s: 1 - s},
    "capturable": {"capturable": True, "overrides": {"head": {"sparsity": 0.3}}},
    "scope function": {"scope": lambda weights, s: torch.stack([w.abs().mean() * s for w in weights])},
}


class PassThrough(TorchDispatchMode):
    """As of a profiler."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


class PassThroughFunction(TorchFunctionMode):
    """As of a logger."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


@contextmanager
def default_device() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def deterministic(fill: bool) -> Iterator[None]:
    before = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = fill
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
        torch.utils.deterministic.fill_uninitialized_memory = before


@contextmanager
def flushed_denormals() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


AROUND_EVERYTHING: dict[str, Mode] = {
    "device meta": lambda: torch.device("meta"),
    "set_default_device": default_device,
    "float64": lambda: default_dtype(torch.float64),
    "float16": lambda: default_dtype(torch.float16),
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "deterministic": lambda: deterministic(fill=False),
    "deterministic, filled": lambda: deterministic(fill=True),
    "dispatch mode": PassThrough,
    "function mode": PassThroughFunction,
    "FLOP counter": lambda: FlopCounterMode(display=False),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "saved on CPU": save_on_cpu,
    "flushed denormals": flushed_denormals,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}
AROUND_CALLS: dict[str, Mode] = {  # in which a model cannot be trained
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "set_grad_enabled": lambda: torch.set_grad_enabled(False),
}


class Net(nn.Module):
    """Convolution, linear, attention and recurrent layers: (N, 3, 8, 8) -> (N, 5)."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.linear = nn.Linear(8, 12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.recurrent = nn.GRU(12, 6)
        self.head = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(self.convolution(x).flatten(2).transpose(1, 2).relu())
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.recurrent(x.transpose(0, 1))[1][0])


def net() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.fixture(autouse=True)
def attention_without_fast_path() -> Iterator[None]:
    """Attention leaves its fast path, with other bits, where a function mode is active."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


PARTS = ("build", "step", "evaluate", "restore", "finalize")


def life(
    options: dict[str, Any], forward: Mode = nullcontext, ours: Mode = nullcontext, parts: tuple[str, ...] = PARTS
) -> dict[str, Any]:
    """Every value of a life; ``forward`` is around passes of the model, ``ours`` around calls of the package."""
    model, seen = net(), {}
    x, labels = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([0, 1, 2, 3])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def around(part: str) -> AbstractContextManager[Any]:
        return ours() if part in parts else nullcontext()

    def look(name: str) -> None:
        bindings = [use.binding for weight in sparsifier.weights for use in weight.uses]
        seen[f"{name}: thresholds"] = [binding.value.clone() for binding in bindings]
        seen[f"{name}: scales"] = [None if b.grad_scale is None else b.grad_scale.clone() for b in bindings]
        seen[f"{name}: weights"] = [parameter.detach().clone() for parameter in model.parameters()]

    def train(steps: int) -> None:
        model.train()
        for _ in range(steps):
            with forward():
                loss = F.cross_entropy(model(x), labels)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            with around("step"):
                sparsifier.step()

    def evaluated(module: nn.Module) -> Tensor:
        with forward(), torch.no_grad():
            return module.eval()(x)

    with around("build"):
        sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=8, **options)
    look("built")
    train(3)
    look("trained")
    with around("evaluate"):
        average = copy.deepcopy(model)
        sparsifier.refresh(average)
        for mean, parameter in zip(average.parameters(), model.parameters(), strict=True):
            mean.data.lerp_(parameter.data * 2, 0.5)
        seen["average, evaluated"] = evaluated(average)
        seen["evaluated"] = evaluated(model)
        seen["report"] = sparsifier.report()
        state = sparsifier.state_dict()
    sparsifier.refresh(average)
    seen["average, evaluated outside"] = evaluated(average)
    weights = copy.deepcopy(model.state_dict())
    train(2)
    look("trained on")
    with around("restore"):
        sparsifier.load_state_dict(state)
        model.load_state_dict(weights)
        seen["restored, evaluated"] = evaluated(model)
        if not callable(options.get("scope")):
            seen["unpickled, evaluated"] = evaluated(pickle.loads(pickle.dumps(model)))
    look("restored")
    train(3)
    look("trained again")
    with around("finalize"):
        sparsifier.finalize()
    seen["final weights"] = [parameter.detach().clone() for parameter in model.parameters()]
    seen["final report"] = sparsifier.report()
    return seen


@lru_cache
def life_without(policy: str, forward: Mode = nullcontext) -> dict[str, Any]:
    return life(POLICIES[policy], forward)


def same(a: Any, b: Any) -> bool:
    """Equal bits, dtype and device, in tensors and lists of them."""
    if isinstance(a, Tensor):
        return (a.dtype, a.device) == (b.dtype, b.device) and a.equal(b)
    return all(map(same, a, b)) if isinstance(a, list) else a == b


def differing(seen: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    assert seen.keys() == wanted.keys()
    return [name for name in wanted if not same(seen[name], wanted[name])]


@pytest.mark.filterwarnings("ignore:the model has:feather_kernels.SparsityWarning")  # a scope function that prunes less
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("mode", AROUND_EVERYTHING)
def test_a_life_inside_of_a_mode_is_that_outside(mode: str, policy: str) -> None:
    around = AROUND_EVERYTHING[mode]
    wanted = life_without(policy, around if mode == "autocast" else nullcontext)
    assert differing(life(POLICIES[policy], around, around), wanted) == []


@pytest.mark.filterwarnings("ignore:the model has:feather_kernels.SparsityWarning")
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(
    ("mode", "part"), [*((mode, "all") for mode in AROUND_CALLS), *(("inference_mode", part) for part in PARTS)]
)
def test_a_part_of_a_life_inside_of_a_mode_is_that_outside(mode: str, part: str, policy: str) -> None:
    parts = PARTS if part == "all" else (part,)
    seen = life(POLICIES[policy], ours=AROUND_CALLS[mode], parts=parts)
    assert differing(seen, life_without(policy)) == []


def test_a_report_in_inference_mode_leaves_nothing_to_later_steps_that_they_cannot_use() -> None:
    model = net()
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=8, score_scale="fan", min_density=0.1)
    with torch.inference_mode():
        sparsifier.report()
    kept = sparsifier._policy._on_device
    assert kept
    assert not any(tensor.is_inference() for tensor in kept.values())


def test_fake_tensors_are_refused_and_leave_the_model_dense() -> None:
    with FakeTensorMode():
        fake = net()
    with pytest.raises(RuntimeError, match="FakeTensorMode"):
        fk.Sparsifier(fake, sparsity=0.8, total_steps=8)
    model = net()
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(RuntimeError, match="FakeTensorMode"):
        fk.Sparsifier(model, sparsity=0.8, total_steps=8)
    assert [type(fake.linear), type(model.linear)] == [nn.Linear, nn.Linear]
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=8)
    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.raises(RuntimeError, match="FakeTensorMode"):
            sparsifier.refresh()
        with pytest.raises(RuntimeError, match="FakeTensorMode"):
            sparsifier.finalize()
    assert type(model.linear) is not nn.Linear


def test_tiny_thresholds_of_scaled_scores_need_no_wide_default_dtype() -> None:
    levels, scales = torch.tensor([1e-30, 1e-20, 1e-3]), torch.tensor([0.3, 0.3, 0.3])
    wanted = largest_below(levels, scales)
    assert torch.isfinite(wanted).all()
    with default_dtype(torch.float16):
        assert same(largest_below(levels, scales), wanted)


# ------------------------------------------------------------------------------------------------ ops, backends

OPS_MODES = {**AROUND_EVERYTHING, **AROUND_CALLS}
weights = [torch.randn(300, 7, generator=torch.Generator().manual_seed(2)), torch.linspace(-2, 3, 41)]
ranks, caps, t = torch.tensor([700, 11]), torch.tensor([1500, 20]), torch.tensor(0.5)


def results() -> list[Tensor]:
    """Of every op on a list of tensors, in groups and with caps; nothing is left of earlier uploads."""
    device_constants._kept.clear()
    ops = torch.ops.feather_kernels
    selected = ops.magnitude_select(weights, [0, 1], ranks)
    return [
        selected,
        ops.magnitude_select(weights, [0, 1], ranks, hint=selected),
        ops.magnitude_select(weights, [1, 0], ranks.flip(0), caps=caps),
        ops.magnitude_histogram(weights, [0, 1], torch.zeros_like(ranks), 23, 8),
        ops.count_pruned(weights, [t, t]),
        ops.threshold(weights[0], t, 3.0),
        ops.scale_pruned_grad(weights[1], weights[1], t, t),
        fk.functional.magnitude_threshold(weights, 0.7),
        fk.functional.threshold(weights[0], 0.5),
    ]


def uploads() -> list[Tensor]:
    return [upload.tensor for upload in device_constants._kept.values()]


@pytest.mark.parametrize("mode", OPS_MODES)
def test_ops_inside_of_a_mode_give_what_they_give_outside(backend: BackendUnderTest, mode: str) -> None:
    wanted = results()
    with OPS_MODES[mode]():
        seen = results()
    assert [tensor.device for tensor in uploads()] == [CPU] * len(uploads())
    assert not any(tensor.is_inference() for tensor in uploads())
    assert same(seen, wanted)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("mode", ["device meta", "float16", "inference_mode"])
def test_triton_uploads_its_tables_from_the_cpu_in_every_mode(mode: str) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    with ptx_executor(90), fk.use_backend("triton"):
        wanted = results()
        with OPS_MODES[mode]():
            seen = results()
        assert uploads()
        assert not any(tensor.is_inference() for tensor in uploads())
    assert same(seen, wanted)


@pytest.mark.parametrize("mode", ["device meta", "float16"])
@pytest.mark.parametrize("op", TESTS)
def test_selftest_passes_in_every_mode(op: str, mode: str) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        with OPS_MODES[mode](), torch.no_grad():
            _, error, bound, _ = TESTS[op](dtype, CPU)
        assert error <= bound


# ------------------------------------------------------------------------------------------------ the sources

INTEGERS = ("arange", "randint", "randperm")  # of integers, whatever the default dtype is
NUMBERS = ("as_tensor", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "scalar_tensor", "tensor", "zeros")
NAMED = {
    **{f"torch.{name}": {"device"} for name in INTEGERS},
    **{f"torch.{name}": {"device", "dtype"} for name in NUMBERS},
}


def left_to_defaults(call: ast.Call) -> set[str]:
    """What a call that makes a tensor takes from the user's defaults."""
    name = ast.unparse(call.func)
    if name == "torch.where":  # of two numbers
        return {"dtype"} if all(isinstance(value, ast.Constant) for value in call.args[1:]) else set()
    return NAMED.get(name, set()) - {str(keyword.arg) for keyword in call.keywords}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_every_new_tensor_of_the_package_names_its_device_and_dtype(path: Path) -> None:
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    found = {f"{call.lineno}: {ast.unparse(call)}": left_to_defaults(call) for call in calls if left_to_defaults(call)}
    assert found == {}


# ------------------------------------------------------------------------------------------------ skipped steps


@pytest.mark.parametrize("shape", [(), (1,)])
@pytest.mark.parametrize("capturable", [False, True])
def test_a_skipped_step_does_not_count(capturable: bool, shape: tuple[int, ...]) -> None:
    sparsifier = fk.Sparsifier(net(), sparsity=0.8, total_steps=8, capturable=capturable)
    position = sparsifier._position
    for found_inf, count in ((0.0, 1), (1.0, 1), (0.0, 2), (2.0, 2)):
        position.advance(torch.full(shape, found_inf))
        assert position.step == count
    position.advance()
    assert position.step == 3


def test_a_skipped_step_of_a_captured_schedule_is_not_read_on_the_host() -> None:
    sparsifier = fk.Sparsifier(net(), sparsity=0.8, total_steps=8, capturable=True)
    skipped = torch.tensor([1.0])
    with NoHostRead():
        sparsifier._position.advance(skipped)
    assert sparsifier.step_count == 0
