"""Choice of the backend: order, names, the environment, errors that list every reason."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Iterator

import pytest
import torch

import feather_kernels as fk
from feather_kernels.backends import cpp, reference
from feather_kernels.ops import dispatch

CPU = torch.device("cpu")


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A backend first in the order for cpu whose probe gives a reason; yields the record of its probes."""
    probes: list[str] = []
    module = types.ModuleType("broken_backend")
    module.probe = lambda device: probes.append(str(device)) or "its kernel does not compile"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "broken_backend", module)
    monkeypatch.setitem(dispatch.BACKENDS, "broken", "broken_backend")
    monkeypatch.setitem(dispatch.BACKENDS, "absent", "no_such_module_anywhere")
    monkeypatch.setitem(dispatch.ORDER, "cpu", ("broken", "absent", "reference"))
    dispatch.reset()
    yield probes
    dispatch.reset()


def test_default_is_cpp_on_a_cpu_and_the_reference_elsewhere() -> None:
    built = dispatch.availability(CPU)["cpp"] is None
    assert dispatch.backend_for(CPU) is (cpp if built else reference)
    assert dispatch.backend_for(torch.device("xpu")) is reference


def test_falls_to_the_next_backend_and_probes_once(broken: list[str]) -> None:
    for _ in range(3):
        assert dispatch.backend_for(CPU) is reference
    assert broken == ["cpu"]
    assert dispatch.availability(CPU) == {
        "broken": "its kernel does not compile",
        "absent": "cannot be imported: No module named 'no_such_module_anywhere'",
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
    assert dispatch.chosen_name(CPU) == "reference"
    with fk.use_backend("broken"), pytest.raises(fk.BackendUnavailableError, match="'broken' cannot run on cpu"):
        dispatch.chosen_name(CPU)
    monkeypatch.setitem(dispatch.BACKENDS, "alias", reference.__name__)  # a second name of one module
    with fk.use_backend("alias"):
        assert dispatch.chosen_name(CPU) == "alias"
        assert dispatch.backend_for(CPU) is reference


def test_no_backend_at_all(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(fk.BackendUnavailableError, match=r"no backend can run on meta.*have no data"):
        dispatch.backend_for(torch.device("meta"))


def test_unknown_names(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = f"must be one of auto, {', '.join(dispatch.BACKENDS)}, got 'refrence'"
    with pytest.raises(ValueError, match="backend " + expected), fk.use_backend("refrence"):
        pass
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "refrence")
    with pytest.raises(ValueError, match=dispatch.ENVIRONMENT_VARIABLE + " " + expected):
        torch.ops.feather_kernels.threshold(torch.ones(1), torch.tensor(0.1), 3.0)


@pytest.mark.usefixtures("broken")
def test_environment_names_a_backend_and_use_backend_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "broken")
    with pytest.raises(fk.BackendUnavailableError):
        dispatch.backend_for(CPU)
    with fk.use_backend("auto"):
        assert dispatch.backend_for(CPU) is reference


def test_choice_holds_in_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    module = types.ModuleType("counting_backend")
    module.__dict__.update(reference.__dict__)

    def scale(*args: torch.Tensor) -> None:
        calls.append("scale")
        reference.scale_pruned_grad(*args)

    module.scale_pruned_grad = scale  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "counting_backend", module)
    monkeypatch.setitem(dispatch.BACKENDS, "counting", "counting_backend")
    dispatch.reset()
    w = torch.randn(5, requires_grad=True)
    with fk.use_backend("counting"):
        fk.functional.threshold(w, 0.5, grad_scale=0.5).sum().backward()
    assert calls == ["scale"]
    dispatch.reset()


def test_import_is_cheap() -> None:
    code = """
import sys, torch
before = set(sys.modules)
import feather_kernels
new = {name.split(".")[0] for name in set(sys.modules) - before}
heavy = new & {"triton", "numpy", "torchvision", "sklearn", "matplotlib", "rich", "safetensors"}
assert not heavy, heavy
assert "torch._inductor" not in set(sys.modules) - before
"""
    subprocess.run([sys.executable, "-c", code], check=True)
