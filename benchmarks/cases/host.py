"""What sparse layers and the sparsifier's step cost the host: layers so small that nothing else counts.

On the CPU, and on the GPU path over ``benchmarks/fake_cuda_driver``, where no kernel runs: its gates can only look at
the numbers of launches.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import backends, fake_cuda_driver
from benchmarks.case import Case, Figure, Setting, Trial, Variant

CHECKOUT = Path(__file__).parents[2]
CPU, STAND_IN = "cpu", "stand-in"
WAYS = ("eager", "compiled")
GRAD_SCALES = (1.0, 0.5)
LIMIT, STEP_LIMIT = "dense", "SGD.step"
LAUNCHES = "launches"


def layer_operation(path: str, way: str, grad_scale: float) -> str:
    """The operation of a trial of layers."""
    return f"layer, {path}, {way}, grad_scale {grad_scale:g}"


def step_operation(path: str) -> str:
    """The operation of a trial of ``Sparsifier.step`` with 20 layers."""
    return f"step, {path}"


def ours(path: str) -> str:
    """The variant with Feather: the default backend, on the GPU path Triton's."""
    return backends.variant_name("triton" if path == STAND_IN else backends.available(torch.device("cpu"))[0])


def trials(setting: Setting) -> Iterator[Trial]:
    """Dense and sparse layers, forward and backward; steps of the sparsifier and of SGD. Always on the CPU."""
    for path in (CPU, STAND_IN):
        prepare = partial(connect, path, setting.smoke)
        for way in WAYS:
            for grad_scale in GRAD_SCALES:
                layers: dict[str, Any] = {
                    LIMIT: partial(layer, way=way, grad_scale=None),
                    ours(path): partial(layer, way=way, grad_scale=grad_scale),
                }
                operation = layer_operation(path, way, grad_scale)
                yield Trial(operation, "", None, prepare, layers, LIMIT, setting.rounds(15), 30.0)
        steps: dict[str, Any] = {STEP_LIMIT: partial(step, sparse=False), ours(path): partial(step, sparse=True)}
        yield Trial(step_operation(path), "", None, prepare, steps, STEP_LIMIT, setting.rounds(15), 30.0)


class Process:
    """A ``benchmarks.host_process`` for a path: the stand-in driver holds for the process that activates it."""

    def __init__(self, path: str, smoke: bool) -> None:
        self.path = path
        options = ["--smoke"] if smoke else []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.host_process", path, *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=CHECKOUT,
            env={**os.environ, "KINETO_LOG_LEVEL": "99"},  # it reports every use of the profiler
        )
        atexit.register(self.end)

    def ask(self, name: str, *arguments: Any) -> Any:
        """What a method of its ``Host`` returns."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        print(json.dumps([name, *arguments]), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the process ended with status {self.process.wait()} when asked for {name}{arguments}")
        return json.loads(answer)

    def end(self) -> None:
        """Let it end: there are no more requests."""
        self.process.communicate()


@cache
def started(path: str, smoke: bool) -> Process:
    """The process for a path; one for all trials."""
    return Process(path, smoke)


def connect(path: str, smoke: bool) -> Callable[[], Process]:
    """The data of a trial: a function that gives the process, or raises a RuntimeError that says what it lacks."""

    def connected() -> Process:
        if path == STAND_IN and (reason := fake_cuda_driver.missing()):
            raise RuntimeError(reason)
        return started(path, smoke)

    return connected


def layer(connected: Callable[[], Process], way: str, grad_scale: float | None) -> Variant:
    """Forward and backward of a layer."""
    process = connected()
    counts = process.ask("count_layers", way, grad_scale)

    def gate(_: float) -> str | None:
        launches = counts["triton_launches"]
        if grad_scale is None or process.path == CPU:
            wrong = process.ask("wrong", way, grad_scale) if grad_scale is not None else None
            return wrong or (f"{launches} launches of Triton's kernels" if launches else None)
        return None if launches in (1, 2) else f"{launches} launches of Triton's kernels for a layer"

    return Variant(
        partial(process.ask, "time_layers", way, grad_scale), 0, gate, self_timed=True, figures=as_figures(counts)
    )


def step(connected: Callable[[], Process], sparse: bool) -> Variant:
    """One step."""
    process = connected()
    counts = process.ask("count_step", sparse)

    def gate(_: float) -> str | None:
        launches = counts["triton_launches"]
        as_it_should = launches > 0 if sparse and process.path == STAND_IN else launches == 0
        return None if as_it_should else f"{launches} launches of Triton's kernels"

    return Variant(partial(process.ask, "time_step", sparse), 0, gate, self_timed=True, figures=as_figures(counts))


def as_figures(counts: Mapping[str, float]) -> dict[str, Figure]:
    """Launches by kind, and together where both kinds were counted."""
    together = {LAUNCHES: sum(counts.values())} if len(counts) == 2 else {}
    return {name: Figure(count, "count") for name, count in (*counts.items(), *together.items())}


CASE = Case("host", trials)
