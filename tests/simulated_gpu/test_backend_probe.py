"""The probe by which a backend shows that it can launch here: a full memory, a broken device, a failed load."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from feather_kernels.backends import reference
from feather_kernels.backends.gpu import probe
from feather_kernels.backends.registry import registry
from tests.conftest import CPU, ptx_executor
from tests.gpu.gpu_device import GPU, on_a_gpu

compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
NO_MEMORY = {
    "Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "the runtime": RuntimeError("threshold: CUDA error cudaErrorMemoryAllocation: out of memory"),
    "the driver": RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
    "torch, late": getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory"),
}
OTHERS = (
    RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448"),
    FileNotFoundError("no C compiler"),
)


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Exception]]:
    """A backend for CUDA whose probe launches on the CPU: the first launches raise what the list holds."""
    failures: list[Exception] = []
    module = types.ModuleType("probed_backend")

    def threshold(*arguments: Any) -> None:
        if failures:
            raise failures.pop(0)
        reference.threshold(*arguments)

    module.probe = lambda _: probe.probe_by_launch(threshold, CPU, str)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(registry.modules, "probed", module.__name__)
    monkeypatch.setitem(registry.order, "cuda", ("probed", "reference"))
    registry.reset()
    yield failures
    registry.reset()


@pytest.mark.parametrize("error", NO_MEMORY)
def test_a_gpu_that_is_full_when_the_module_loads_is_probed_again(error: str, probed: list[Exception]) -> None:
    probed.append(NO_MEMORY[error])
    with pytest.raises(type(NO_MEMORY[error]), match=r"(?i)out.of.memory"):
        registry.chosen_name(GPU)
    assert registry.chosen_name(GPU) == "probed"


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
def test_what_says_that_a_backend_cannot_run_is_remembered(error: Exception, probed: list[Exception]) -> None:
    probed.append(error)
    assert [registry.chosen_name(GPU) for _ in range(3)] == ["reference"] * 3
    assert registry.availability(GPU)["probed"] == f"its probe kernel failed: {error}"


@compiles
def test_triton_loads_a_module_again_that_did_not_load_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from feather_kernels.backends import triton

    with ptx_executor(90) as driver:
        load, loads = driver.utils.load_binary, []

        def load_when_there_is_room(*arguments: Any) -> Any:
            loads.append(arguments[0])
            if len(loads) == 1:
                raise RuntimeError("Triton Error [CUDA]: out of memory")
            return load(*arguments)

        monkeypatch.setattr(driver.utils, "load_binary", load_when_there_is_room)
        triton.elementwise.threshold_kernel.function.device_caches.clear()
        with pytest.raises(RuntimeError, match="out of memory"):
            probe.probe_by_launch(triton.threshold, CPU, triton.describe)
        assert probe.probe_by_launch(triton.threshold, CPU, triton.describe) is None
        assert loads == ["threshold_kernel"] * 2


class BrokenDevice:
    """A device that reports an illegal access of an earlier kernel at whatever waits for it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.waited: list[Any] = []
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.cuda, "synchronize", self.synchronize)

    def synchronize(self, device: Any) -> None:
        self.waited.append(device)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def no_launch(*_: Any) -> None:
    raise AssertionError("the probe was launched")


def test_an_error_of_an_earlier_kernel_is_not_taken_for_the_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("probed_backend")
    module.probe = lambda device: probe.probe_by_launch(no_launch, device, str)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(registry.modules, "probed", module.__name__)
    monkeypatch.setitem(registry.order, "cuda", ("probed", "reference"))
    registry.reset()
    device = BrokenDevice(monkeypatch)
    for count in (1, 2):
        with pytest.raises(RuntimeError, match=r"cuda:0 reports an error of an earlier .*illegal memory") as e:
            registry.backend_for(GPU)
        assert str(e.value.__cause__) == "CUDA error: an illegal memory access was encountered"
        assert device.waited == [GPU] * count
    assert not registry.is_probed("probed", GPU)
    registry.reset()


BROKEN = """
import torch
import feather_kernels as fk
w, t = torch.ones(8, device="cuda"), torch.tensor(0.5, device="cuda")
torch.arange(8, device="cuda")[torch.full((1,), 99, device="cuda")]  # fails later, on the device
fk.functional.threshold(w, t)
"""


@on_a_gpu
def test_a_users_own_failed_kernel_is_reported_as_an_earlier_error() -> None:
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cuda:0 reports an error of an earlier operation, before feather_kernels launches" in done.stderr
