"""Launches of the Triton backend: a kept kernel is the one that Triton would launch, and hooks still work.

``conftest.checked`` compares the two at every launch on the executor.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import feather_kernels as fk  # noqa: E402
from feather_kernels.backends.triton import elementwise, launch  # noqa: E402
from tests.conftest import ptx_executor  # noqa: E402
from tests.support import samples  # noqa: E402
from tools.ptx_executor import driver as ptx_driver  # noqa: E402

ops = torch.ops.feather_kernels
T = torch.tensor(0.5)


@pytest.fixture
def own_launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that were launched by Triton's own way."""
    names: list[str] = []
    kernel_class = type(elementwise.threshold_kernel.function)
    run = kernel_class.run

    def noted(self: Any, *arguments: Any, warmup: bool, **options: Any) -> Any:
        if not warmup:
            names.append(self.fn.__name__)
        return run(self, *arguments, warmup=warmup, **options)

    monkeypatch.setattr(kernel_class, "run", noted)
    return names


def right(w: torch.Tensor) -> None:
    assert ops.threshold(w, T, float("inf")).equal(torch.where(w.abs() > T, w, 0.0))


def test_a_form_is_looked_up_once(own_launches: list[str]) -> None:
    with ptx_executor(90) as gpu, fk.use_backend("triton"):
        for size in (3, 7000, 16):
            right(torch.randn(size))
            assert own_launches == ["threshold_kernel"]
        right(samples.LAYOUTS["misaligned"](torch.randn(64)))
        ops.threshold(torch.randn(9).bfloat16(), T, 3.0)
        ops.threshold(torch.randn(9), T, 3.0)
        assert own_launches == ["threshold_kernel"] * 4
        assert len(gpu.launches) == 6


def test_selection_looks_nothing_up_twice(own_launches: list[str]) -> None:
    weights, rank, hint = [torch.randn(300), torch.randn(40)], torch.tensor([170]), torch.ones(1, 2)
    with ptx_executor(90) as gpu, fk.use_backend("triton"):
        first = ops.magnitude_select(weights, [0, 0], rank, hint=hint)
        looked_up = len(own_launches)
        assert ops.magnitude_select(weights, [0, 0], rank, hint=hint).equal(first)
        assert len(own_launches) == looked_up < len(gpu.launches) / 2


def test_without_the_class_of_compiled_kernels(own_launches: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "COMPILED", ())
    with ptx_executor(90, check=False), fk.use_backend("triton"):
        for _ in range(3):
            right(torch.randn(40))
    assert own_launches == ["threshold_kernel"] * 3


def test_another_driver_has_kernels_of_its_own() -> None:
    for architecture in (90, 80, 90):
        with ptx_executor(architecture) as gpu, fk.use_backend("triton"):
            for _ in range(2):
                right(torch.randn(40))
            assert len(gpu.launches) == 2
            compiled = set(elementwise.threshold_kernel.kept.values())
            assert {kernel.metadata.target.arch for kernel in compiled} == {architecture}


def test_hooks_of_a_launch_are_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """What profilers add. Triton's launcher calls them; the executor's does not, so it is done here."""
    seen: list[str] = []
    run = ptx_driver._Launcher.__call__

    def hooked(self: Any, *arguments: Any) -> None:
        metadata, enter = arguments[6:8]
        enter(metadata)
        run(self, *arguments)

    def enter(metadata: Any) -> None:
        seen.append(metadata.get()["name"])

    monkeypatch.setattr(ptx_driver._Launcher, "__call__", hooked)
    with ptx_executor(90), fk.use_backend("triton"):
        for listening in (False, True, False):
            if listening:
                triton.knobs.runtime.launch_enter_hook.add(enter)
            try:
                right(torch.randn(40))
            finally:
                triton.knobs.runtime.launch_enter_hook.remove(enter)
            assert seen == ["threshold_kernel"] * listening
            seen.clear()


def test_tables_are_made_on_the_host_whatever_the_default_device() -> None:
    weights, ranks, caps = [torch.randn(300), torch.randn(41)], torch.tensor([100, 7]), torch.tensor([200, 40])
    for options in ({}, {"caps": caps}, {"hint": torch.ones(2, 2)}):
        with fk.use_backend("reference"):
            expected = ops.magnitude_select(weights, [0, 1], ranks, **options)
        with ptx_executor(90), fk.use_backend("triton"), torch.device("meta"):
            assert ops.magnitude_select(weights, [0, 1], ranks, **options).equal(expected)


@pytest.mark.parametrize("length", [1 << 31, (1 << 31) - 1])
@pytest.mark.parametrize("call", [ops.threshold, ops.scale_pruned_grad], ids=["threshold", "scale"])
def test_the_width_of_the_number_of_elements(call: Callable[..., Any], length: int) -> None:
    """Triton compiles apart what does not fit into 32 bits; nothing is executed, so the memory is never touched."""
    t = torch.tensor(0.5)
    with ptx_executor(90, execute=False), fk.use_backend("triton"):
        for n in (40, length, 40):
            w = torch.empty(n, dtype=torch.float16)
            if call is ops.threshold:
                call(w, t, 3.0)
            else:
                call(w, w, t, t)
