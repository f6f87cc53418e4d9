"""Choice of the backend: order, names, the environment, errors that list every reason, what is logged."""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import feather_kernels as fk
from feather_kernels.backends import cpp, reference
from feather_kernels.backends.gpu.device_guard import device_guard
from feather_kernels.backends.registry import registry

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A backend first in the order for cpu whose probe gives a reason; yields the record of its probes."""
    probes: list[str] = []
    module = types.ModuleType("broken_backend")
    module.probe = lambda device: probes.append(str(device)) or "its kernel does not compile"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "broken_backend", module)
    monkeypatch.setitem(registry.modules, "broken", "broken_backend")
    monkeypatch.setitem(registry.modules, "absent", "no_such_module_anywhere")
    for device in ("cpu", "cuda"):
        monkeypatch.setitem(registry.order, device, ("broken", "absent", "reference"))
    registry.reset()
    yield probes
    registry.reset()


def test_default_is_cpp_on_a_cpu_and_the_reference_elsewhere() -> None:
    built = registry.availability(CPU)["cpp"] is None
    assert registry.backend_for(CPU) is (cpp if built else reference)
    assert registry.backend_for(torch.device("xpu")) is reference


def test_nvidia_gpus_take_triton_first() -> None:
    assert registry.order["cuda"] == ("triton", "cuda", "reference")


def test_falls_to_the_next_backend_and_probes_once(broken: list[str]) -> None:
    for _ in range(3):
        assert registry.backend_for(CPU) is reference
    assert broken == ["cpu"]
    assert registry.availability(CPU) == {
        "broken": "its kernel does not compile",
        "absent": "is not installed: No module named 'no_such_module_anywhere'",
        "reference": None,
    }


@pytest.mark.usefixtures("broken")
def test_named_backend_that_cannot_run_raises_with_every_reason() -> None:
    w, t = torch.randn(3), torch.tensor(0.1)
    with fk.use_backend("broken"):
        with pytest.raises(fk.BackendUnavailableError) as raised:
            torch.ops.feather_kernels.threshold(w, t, 3.0)
        with fk.use_backend("reference"):
            torch.ops.feather_kernels.threshold(w, t, 3.0)
    for part in ("'broken' cannot run on cpu", "its kernel does not compile", "no_such_module", "reference: available"):
        assert part in str(raised.value)
    torch.ops.feather_kernels.threshold(w, t, 3.0)


@pytest.mark.usefixtures("broken")
def test_chosen_name_is_that_of_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert registry.chosen_name(CPU) == "reference"
    with fk.use_backend("broken"), pytest.raises(fk.BackendUnavailableError, match="'broken' cannot run on cpu"):
        registry.chosen_name(CPU)
    monkeypatch.setitem(registry.modules, "alias", reference.__name__)  # a second name of one module
    with fk.use_backend("alias"):
        assert registry.chosen_name(CPU) == "alias"
        assert registry.backend_for(CPU) is reference


def test_no_backend_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(fk.BackendUnavailableError, match=r"no backend can run on meta.*have no data"):
        registry.backend_for(torch.device("meta"))


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = f"must be one of auto, {', '.join(registry.modules)}, got 'refrence'"
    with pytest.raises(ValueError, match="backend " + expected), fk.use_backend("refrence"):
        pass
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "refrence")
    registry.reset()
    with pytest.raises(ValueError, match=registry.ENVIRONMENT_VARIABLE + " " + expected):
        torch.ops.feather_kernels.threshold(torch.ones(1), torch.tensor(0.1), 3.0)


@pytest.mark.usefixtures("broken")
def test_environment_names_a_backend_and_use_backend_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "broken")
    with pytest.raises(fk.BackendUnavailableError):
        registry.backend_for(CPU)
    with fk.use_backend("auto"):
        assert registry.backend_for(CPU) is reference


def test_choice_holds_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    module = types.ModuleType("counting_backend")
    module.__dict__.update(reference.__dict__)

    def scale(*args: torch.Tensor) -> None:
        calls.append("scale")
        reference.scale_pruned_grad(*args)

    module.scale_pruned_grad = scale  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "counting_backend", module)
    monkeypatch.setitem(registry.modules, "counting", "counting_backend")
    registry.reset()
    w = torch.randn(5, requires_grad=True)
    with fk.use_backend("counting"):
        fk.functional.threshold(w, 0.5, grad_scale=0.5).sum().backward()
    assert calls == ["scale"]
    registry.reset()


@pytest.mark.usefixtures("broken")
def test_a_fall_past_a_backend_is_one_warning_for_each_device(caplog: pytest.LogCaptureFixture) -> None:
    for device in (CUDA, CUDA, torch.device("cuda", 1), CUDA):
        assert registry.chosen_name(device) == "reference"
    lines = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    why = "backend 'broken' cannot run: its kernel does not compile; backend 'absent' cannot run: is not installed"
    assert [line[:2] for line in lines] == [("feather_kernels", "WARNING")] * 2
    for number, (_, _, message) in enumerate(lines):
        assert message.startswith(f"cuda:{number}: {why}")
        assert message.endswith("; using 'reference' instead")
        assert "\n" not in message


@pytest.mark.usefixtures("broken")
@pytest.mark.parametrize(
    ("device", "order"), [(CPU, ("broken", "reference")), (CUDA, ("absent", "reference"))], ids=["cpu", "not installed"]
)
def test_what_is_no_surprise_is_no_warning(
    device: torch.device, order: tuple[str, ...], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO, "feather_kernels")
    monkeypatch.setitem(registry.order, device.type, order)
    assert registry.chosen_name(device) == "reference"
    assert [record.levelname for record in caplog.records] == ["INFO"]


@pytest.mark.usefixtures("broken")
def test_a_named_backend_is_no_fall_and_probes_no_other(broken: list[str], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "feather_kernels")
    with fk.use_backend("reference"):
        assert registry.chosen_name(CUDA) == "reference"
    assert broken == []
    assert caplog.records == []


needs_cpp = pytest.mark.skipif(registry.availability(CPU)["cpp"] is not None, reason="the C++ module is not built here")


@needs_cpp
def test_a_power_without_a_kernel_takes_the_reference_and_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "feather_kernels")
    registry.reset()
    w, t, half = torch.randn(1000), torch.tensor(0.5), torch.tensor(0.5)
    out = torch.empty_like(w)
    for power in (2.5, 4):
        expected = torch.empty_like(w)
        reference.threshold(w, t, power, expected)
        torch.ops.feather_kernels.threshold.out(w, t, power, out=out)
        for result in (
            fk.functional.threshold(w, t, power, half),
            torch.ops.feather_kernels.threshold_recompute(w, t, power, w),
            out,
        ):
            assert result.equal(expected)
    assert [(record.name, record.levelname, record.getMessage()) for record in caplog.records] == [
        ("feather_kernels", "INFO", "cpu: backend 'cpp' has the powers 1, 2, 3, inf, not 2.5; using 'reference' for it")
    ]


@needs_cpp
def test_powers_with_a_kernel_take_it() -> None:
    for power in (1, 2.0, 3, float("inf")):
        assert registry.backend_for_threshold(CPU, power) is cpp
    assert registry.backend_for_threshold(CPU, 3.5) is registry.backend_for_threshold(CPU, -0.5) is reference


@needs_cpp
@pytest.mark.parametrize("variable", ["environment", "use_backend"])
def test_a_named_backend_without_the_power_raises(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if variable == "environment":
        monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "cpp")
    registry.reset()
    w, t = torch.randn(9), torch.tensor(0.5)
    named = fk.use_backend("cpp") if variable == "use_backend" else contextlib.nullcontext()
    message = "cpu: backend 'cpp' has the powers 1, 2, 3, inf, not 2.5; the backends 'auto' and 'reference' run it"
    with named:
        with pytest.raises(fk.BackendUnavailableError, match=message):
            torch.ops.feather_kernels.threshold(w, t, 2.5)
        torch.ops.feather_kernels.threshold(w, t, 3.0)
        for able in ("auto", "reference"):
            with fk.use_backend(able):
                torch.ops.feather_kernels.threshold(w, t, 2.5)
    monkeypatch.undo()
    registry.reset()


def test_the_named_reference_has_every_power(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "feather_kernels")
    with fk.use_backend("reference"):
        assert registry.backend_for_threshold(CPU, 2.5) is reference
    assert registry.backend_for_threshold(torch.device("xpu"), 2.5) is reference
    assert caplog.records == []


def test_a_module_that_does_not_load_is_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "outdated_backend.py").write_text("import math\nmath.no_such_function\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(registry.modules, "outdated", "outdated_backend")
    monkeypatch.setitem(registry.order, "cuda", ("outdated", "reference"))
    registry.reset()
    assert registry.availability(CUDA)["outdated"].startswith("cannot be imported: AttributeError: module 'math'")
    registry.reset()


@needs_triton
@pytest.mark.parametrize("variable", ["environment", "use_backend"])
def test_triton_by_name_without_a_gpu_raises_with_the_reason(variable: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    if variable == "environment":
        monkeypatch.setenv(registry.ENVIRONMENT_VARIABLE, "triton")
    registry.reset()
    reason = r"backend 'triton' cannot run on cpu. Probed: triton: runs CPU tensors only in the interpreter"
    named = fk.use_backend("triton") if variable == "use_backend" else contextlib.nullcontext()
    with named, pytest.raises(fk.BackendUnavailableError, match=reason):
        torch.ops.feather_kernels.threshold(torch.ones(1), torch.tensor(0.1), 3.0)
    registry.reset()


@needs_triton
@pytest.mark.skipif(os.name == "nt", reason="the paths of a POSIX system")
@pytest.mark.parametrize("compiler", ["/bin/false", "/no/such/compiler", None], ids=["fails", "missing", "none at all"])
def test_without_a_compiler_triton_is_passed_over(compiler: str | None, tmp_path: Path) -> None:
    """Triton's own CUDA driver meets a broken CC where it builds its C stub: all before the first call of libcuda."""
    code = """
import torch
from torch.overrides import TorchFunctionMode
from triton.backends.nvidia.driver import CudaDriver
CudaDriver.is_active = staticmethod(lambda: True)

class OnTheCpu(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if "device" in kwargs:
            kwargs["device"] = "cpu"
        return function(*args, **kwargs)

from feather_kernels.backends.registry import registry
gpu = torch.device("cuda", 0)
with OnTheCpu():
    chosen = {registry.chosen_name(gpu) for _ in range(3)}
print(chosen, registry.availability(gpu)["triton"])
"""
    environment = {
        **os.environ,
        "TRITON_CACHE_DIR": str(tmp_path / "cache"),
        "TRITON_LIBCUDA_PATH": str(tmp_path),
        "TRITON_DEFAULT_BACKEND": "nvidia",
    }
    for variable in ("TRITON_INTERPRET", registry.ENVIRONMENT_VARIABLE, "CC"):
        environment.pop(variable, None)
    environment |= {"PATH": str(tmp_path)} if compiler is None else {"CC": compiler}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert run.stdout.startswith("{'reference'} its probe kernel failed: ")
    assert (compiler or "Failed to find C compiler") in run.stdout
    lines = [line for line in run.stderr.splitlines() if "backend" in line]
    reason = run.stdout.removeprefix("{'reference'} ").strip()
    assert len(lines) == 1
    assert lines[0].startswith(f"cuda:0: backend 'triton' cannot run: {reason}; backend 'cuda' cannot run: ")
    assert lines[0].endswith("; using 'reference' instead")


def test_kernels_run_on_the_device_of_their_result(monkeypatch: pytest.MonkeyPatch) -> None:
    current = [0]

    @contextlib.contextmanager
    def set_current(device: torch.device) -> Iterator[None]:
        current.append(device.index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", set_current)
    seen = []
    op = device_guard(lambda *arguments: seen.append(current[-1]))
    for device in ("cuda:1", "cuda:0", "cpu"):
        op(None, types.SimpleNamespace(device=torch.device(device)))
    assert seen == [1, 0, 0]


def test_import_is_cheap() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import feather_kernels
new = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = new & {"triton", "numpy", "torchvision", "sklearn", "matplotlib", "rich", "safetensors"}
assert not heavy, heavy
assert "torch._inductor" not in set(sys.modules) - before
assert "feather_kernels.sparsify" not in sys.modules
assert feather_kernels.Sparsifier.__name__ in dir(feather_kernels)
assert "feather_kernels.sparsify" in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_name_that_the_package_does_not_have() -> None:
    with pytest.raises(AttributeError, match="module 'feather_kernels' has no attribute 'Sparsifer'"):
        _ = fk.Sparsifer
    assert all(hasattr(fk, name) for name in fk.__all__)
