"""The parts of a report, and how long each may take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from feather_kernels.backends.registry import registry
from feather_kernels.cli import doctor
from feather_kernels.cli.gpu_report import speed, training
from feather_kernels.cli.selftest import checks

if TYPE_CHECKING:
    from feather_kernels.cli.gpu_report.target import Target

BACKENDS = registry.order["cuda"]
WITH_KERNELS = tuple(name for name in BACKENDS if name != "reference")


class Part(NamedTuple):
    """A part: ``rows`` yields its results, and ``limit`` is its time limit in seconds."""

    rows: Callable[[Target], Iterator[dict[str, object]]]
    limit: int


def machine_rows(target: Target) -> Iterator[dict[str, object]]:
    """Yield one row with the facts about the machine."""
    yield {"facts": target.facts()}


def doctor_rows(target: Target) -> Iterator[dict[str, object]]:  # noqa: ARG001
    """Yield one row with the text of ``doctor``."""
    yield {"text": doctor.examine()}


def selftest_rows(target: Target, backend: str) -> Iterator[dict[str, object]]:
    """Yield a row for each op and dtype, without the times."""
    target.require(backend)
    for check in checks.examine(backend, target.device):
        record = check.record()
        del record["seconds"], record["passed"], record["problem"]
        yield {**record, "wrong": None if check.passed else check.outcome}


MACHINE, DOCTOR, SELFTEST, SPEED, HOST, STEP = "machine", "doctor", "selftest", "speed", "host", "training"
PARTS: dict[str, Part] = {
    MACHINE: Part(machine_rows, 60),
    DOCTOR: Part(doctor_rows, 60),
    **{f"{SELFTEST}-{name}": Part(partial(selftest_rows, backend=name), 120) for name in BACKENDS},
    **{f"{SPEED}-{name}": Part(partial(speed.rows, backend=name), 60) for name in WITH_KERNELS},
    f"{HOST}-eager": Part(partial(training.host_rows, compiled=False), 60),
    f"{HOST}-compiled": Part(partial(training.host_rows, compiled=True), 90),
    STEP: Part(training.step_rows, 60),
}
