"""Runs the evidence that needs processes of its own, and prints a line for each kind at the end of ``make test``.

No GPU is needed. The kinds, in the order of their lines:

- ``interpreter``: the op tests on the Triton backend, in Triton's interpreter.
- ``compiled``: inspects what Triton compiles ahead of time from its kernels, for four architectures.
- ``executed (triton)``, ``executed (cuda)``: the op tests, with the PTX of every launch executed on CPU tensors by
  tools/ptx_executor; for sm_90, or with ``--all`` for four architectures.
- ``sanitized source``: csrc/cuda compiled as C++ for the CPU, under sanitizers.
- ``shipped build``: inspects the module that nvcc builds for users.

docs/gpu.md says what each kind proves and what it does not.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parents[1]
OP_TESTS = ["ops/test_threshold.py", "ops/test_select.py", "ops/test_schema.py"]
ARCHITECTURES = (90, 80, 100, 120)  # the first alone without --all
CUDA_ON_EXECUTOR = {"FEATHER_PTX_BACKEND": "cuda"}
INTERPRETER, COMPILED, TRITON, CUDA, SANITIZED, SHIPPED = KINDS = (
    *("interpreter", "compiled", "executed (triton)", "executed (cuda)", "sanitized source", "shipped build"),
)


class Run(NamedTuple):
    """One pytest process of a kind; ``reason`` says why it cannot run here, "" where it can."""

    kind: str
    files: list[str]
    variables: dict[str, str]
    reason: str = ""


class Outcome(NamedTuple):
    """How a run ended: its counts by word ("passed", ...), and what to show of it if it failed."""

    counts: Counter[str]
    failure: str


def without(module: str) -> str:
    """Why evidence that imports a module is skipped, "" where it is installed."""
    return "" if importlib.util.find_spec(module) else f"no {module}"


def without_any(*programs: str) -> str:
    """Why evidence that calls one of these programs is skipped, "" where one is on the path."""
    return "" if any(map(shutil.which, programs)) else f"no {programs[0]}"


def architecture(number: int) -> dict[str, str]:
    """The variable by which an executor takes the PTX of sm_``number``."""
    return {"FEATHER_PTX_ARCHITECTURE": str(number)}


def runs(architectures: tuple[int, ...]) -> list[Run]:
    """Every process, the longest first: two run at a time."""
    both = [
        *(*OP_TESTS, "simulated_gpu/test_memory_traffic.py", "simulated_gpu/test_executed_training.py"),
        "gpu/test_gpu_executor.py",
    ]
    executed = [*both, "simulated_gpu/test_planted_bugs.py", "simulated_gpu/test_torch_compile.py"]
    triton = without("triton")
    return [
        *(Run(TRITON, executed, architecture(number), triton) for number in architectures),
        Run(INTERPRETER, OP_TESTS, {"TRITON_INTERPRET": "1"}, triton),
        Run(COMPILED, ["simulated_gpu/test_triton_compiled.py"], {}, triton),
        *(
            Run(
                CUDA,
                [*both, "simulated_gpu/test_executed_cuda.py"],
                {**CUDA_ON_EXECUTOR, **architecture(number)},
                without_any("nvcc"),
            )
            for number in architectures
        ),
        Run(SANITIZED, ["simulated_gpu/test_sanitized_source.py"], {}, without_any("g++", "c++")),
        Run(SHIPPED, ["simulated_gpu/test_shipped_build.py"], {}, without_any("nvcc")),
    ]


def carry_out(run: Run) -> Outcome:
    """Run a process to its end, or not at all where it cannot run."""
    if run.reason:
        return Outcome(Counter(), "")
    paths = [str(TESTS / file) for file in run.files]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *paths]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **run.variables}
    done = subprocess.run(command, cwd=TESTS.parent, env=environment, capture_output=True, text=True, check=False)
    counts = Counter[str]()
    for count, word in re.findall(r"(\d+) (passed|failed|errors?|xfailed|xpassed|skipped)\b", last_line(done.stdout)):
        counts[word.removesuffix("s")] += int(count)
    return Outcome(counts, f"{run.kind} {run.variables}\n{done.stdout}{done.stderr}" if done.returncode else "")


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def line(kind: str, listed: list[Run], outcomes: list[Outcome]) -> str:
    """What became of a kind's runs; of those on the executor, for which architectures."""
    own = [(run, outcome) for run, outcome in zip(listed, outcomes, strict=True) if run.kind == kind]
    if reason := own[0][0].reason:
        return f"{kind}: skipped ({reason})"
    total: Counter[str] = sum((outcome.counts for _, outcome in own), Counter())
    words = ", ".join(f"{count} {word}" for word, count in total.items()) or "no test ran"
    architectures = sorted(int(run.variables.get("FEATHER_PTX_ARCHITECTURE", 0)) for run, _ in own)
    return f"{kind}: {words}" + (" (sm_" + ", sm_".join(map(str, architectures)) + ")") * (kind in (TRITON, CUDA))


def main() -> int:
    """Run everything and print a line for each kind; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="execute the PTX of four architectures")
    listed = runs(ARCHITECTURES if parser.parse_args().all else ARCHITECTURES[:1])
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        outcomes = list(pool.map(carry_out, listed))
    print("\n".join(outcome.failure for outcome in outcomes if outcome.failure))
    print("\n".join(line(kind, listed, outcomes) for kind in KINDS))
    return int(any(outcome.failure for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
