"""Fixtures: the backends under test. A new backend joins every op test by one line in ``BACKENDS``."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import settings

import feather_kernels as fk
from feather_kernels.backends.registry import registry
from tests.support import samples

torch.set_num_threads(1)  # small tensors: more threads only fight each other


@dataclass(frozen=True)
class BackendUnderTest:
    """A backend on a device. Triton's interpreter truncates bfloat16 where it should round, and loses its denormals."""

    name: str
    device: torch.device
    exact_bfloat16: bool = True

    def skip_inexact(self, *dtypes: torch.dtype) -> None:
        """Skip the test where one of the dtypes is not to be relied on."""
        if torch.bfloat16 in dtypes and not self.exact_bfloat16:
            pytest.skip("Triton's interpreter truncates bfloat16")

    @property
    def powers(self) -> tuple[float, ...]:
        """The powers that it is tested with."""
        return (*samples.POWERS, *samples.OTHER_POWERS) if self.name == "reference" else samples.POWERS

    def __str__(self) -> str:
        return f"{self.name}-{self.device}"


CPU = torch.device("cpu")
# processes of their own set these (tests/simulated_gpu/evidence.py): Triton reads TRITON_INTERPRET at import
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
PTX_ARCHITECTURE = int(os.environ.get("FEATHER_PTX_ARCHITECTURE", 0))  # e.g. 90: run compiled PTX on the executor
PTX_BACKEND = os.environ.get("FEATHER_PTX_BACKEND", "triton")  # whose kernels: triton's or cuda's
CUDA_MODULE = os.environ.get("FEATHER_CUDA_MODULE", "")  # path of a build of _cuda that runs its kernels on the CPU
TEST_DEVICE = os.environ.get("FEATHER_TEST_DEVICE", "")  # "cuda": the op tests on every backend of a GPU (gpu_check.py)
SLOW_DEVICE = INTERPRETED or PTX_ARCHITECTURE > 0 or CUDA_MODULE != ""
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=20 if SLOW_DEVICE else 60)
settings.load_profile("ci")
if CUDA_MODULE or (PTX_ARCHITECTURE and PTX_BACKEND == "cuda"):
    BACKENDS = [BackendUnderTest("cuda", CPU)]
elif SLOW_DEVICE:
    BACKENDS = [BackendUnderTest("triton", CPU, exact_bfloat16=not INTERPRETED)]
elif TEST_DEVICE:
    offered = registry.availability(torch.device(TEST_DEVICE, 0))
    BACKENDS = [BackendUnderTest(name, torch.device(TEST_DEVICE, 0)) for name in offered if offered[name] is None]
else:
    BACKENDS = [BackendUnderTest("reference", CPU)]
    if registry.availability(CPU).get("cpp", "unknown") is None:
        BACKENDS.append(BackendUnderTest("cpp", CPU))
each_power = pytest.mark.parametrize(
    ("backend", "p"),
    [(under_test, p) for under_test in BACKENDS for p in under_test.powers],
    indirect=["backend"],
    ids=str,
)


if INTERPRETED:
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def fma_through_float64(self: Any, x: Any, y: Any, z: Any) -> Any:
        """a b + c of float32 as devices round it, but for ties of the wider sum; the interpreter rounds a b too.

        P(w) for p = 3 is within 2 ulp only where it is fused.
        """
        exact = x.data.astype("float64") * y.data + z.data
        return TensorHandle(exact.astype(z.data.dtype), z.dtype.scalar)

    InterpreterBuilder.create_fma = fma_through_float64


@pytest.fixture
def executor() -> Iterator[Any]:
    """What executes PTX where one was asked for, whose ``launches`` has a report of each launch; else None."""
    if PTX_ARCHITECTURE and PTX_BACKEND == "cuda":
        from tests.simulated_gpu.executed_cuda import executed

        chosen: Any = executed(PTX_ARCHITECTURE)
    else:
        chosen = ptx_executor() if PTX_ARCHITECTURE else nullcontext()
    with chosen as driver:
        yield driver


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request: pytest.FixtureRequest, executor: Any) -> Iterator[BackendUnderTest]:
    chosen: BackendUnderTest = request.param
    with ExitStack() as stack:
        if CUDA_MODULE:
            from tests.simulated_gpu.cuda_module_on_cpu import cuda_on_cpu

            stack.enter_context(cuda_on_cpu(CUDA_MODULE))
        stack.enter_context(fk.use_backend(chosen.name))
        registry.backend_for(chosen.device)
        yield chosen


@contextmanager
def ptx_executor(
    architecture: int = PTX_ARCHITECTURE, *, execute: bool = True, noise: bool = True, check: bool = True
) -> Iterator[Any]:
    """The Triton backend takes CPU tensors: its compiled PTX runs on them, with all of the executor's checks.

    With ``noise`` approximate instructions err as PTX allows. Without ``execute`` kernels are compiled only (see
    ``simulated_gpu``). Without ``check`` nothing compares the kernels that are kept with those of Triton's own launch.
    """
    from feather_kernels.backends.triton import chunks
    from feather_kernels.backends.triton.launch import Kernel
    from tools.ptx_executor.driver import simulated_gpu

    with (
        simulated_gpu(architecture, noise=noise, execute=execute) as driver,
        pytest.MonkeyPatch.context() as patch,
        registry.assume_available("triton", CPU),
    ):
        patch.setattr(chunks, "make_tables", exposing(driver, chunks.make_tables))
        if check:
            patch.setattr(Kernel, "launch", checked(Kernel.launch))
        yield driver


def checked(launch: Callable[..., None]) -> Callable[..., None]:
    """``Kernel.launch``, checked to keep for each specialization the kernel that Triton has for the arguments."""
    from feather_kernels.backends.triton.launch import COMPILE

    def launch_and_check(kernel: Any, programs: int, specialization: Any, *arguments: Any) -> None:
        launch(kernel, programs, specialization, *arguments)
        wanted = kernel.function.warmup(*arguments, grid=(programs,), **COMPILE)
        kept = kernel.kept[arguments[0].device, specialization]
        assert kept is wanted, f"{kernel.function}: {specialization} is not all it depends on"

    return launch_and_check


def exposing(driver: Any, make_tables: Callable[..., Any]) -> Callable[..., Any]:
    """``make_tables`` of the backend, with what it lists exposed to the executor, for as long as it lives."""

    def make_tables_and_expose(weights: Sequence[torch.Tensor], rows: Sequence[int]) -> Any:
        tables = make_tables(weights, rows)
        for made in tables:
            driver.expose(made.kept)
        return tables

    return make_tables_and_expose


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """What tests recorded (``record_property``), one line each."""
    recorded = [recorded for report in terminalreporter.stats.get("passed", []) for recorded in report.user_properties]
    if recorded:
        terminalreporter.section("recorded")
    for name, value in recorded:
        terminalreporter.write_line(f"{name}: {value}")
