"""The rings that need a process of their own, and a line for each as the last lines of ``make test``.

Ring 1: the op tests on the Triton backend in Triton's interpreter. Ring 2: its kernels compiled ahead of time. Ring 3:
the compiled PTX of the op tests' launches, executed on CPU tensors: for sm_90, or with ``--all`` for four
architectures. Rings 4 to 6 are the CUDA C++ kernels', where their test files exist. See docs/gpu.md.
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

TESTS = Path(__file__).parent
OP_TESTS = ["test_threshold.py", "test_select.py", "test_schema.py"]
ARCHITECTURES = (90, 80, 100, 120)  # the first alone without --all
CUDA_ON_EXECUTOR = {"FEATHER_PTX_BACKEND": "cuda"}


class Run(NamedTuple):
    """One pytest process of a ring; ``reason`` says why it cannot run here, "" where it can."""

    ring: int
    files: list[str]
    variables: dict[str, str]
    reason: str = ""


class Outcome(NamedTuple):
    """How a run ended: its counts by word ("passed", ...), and what to show of it if it failed."""

    counts: Counter[str]
    failure: str


def without(module: str) -> str:
    """Why a ring that imports a module is skipped, "" where it is installed."""
    return "" if importlib.util.find_spec(module) else f"no {module}"


def without_any(*programs: str) -> str:
    """Why a ring that calls one of these programs is skipped, "" where one is on the path."""
    return "" if any(map(shutil.which, programs)) else f"no {programs[0]}"


def architecture(number: int) -> dict[str, str]:
    """The variable by which an executor takes the PTX of sm_``number``."""
    return {"FEATHER_PTX_ARCHITECTURE": str(number)}


def runs(architectures: tuple[int, ...]) -> list[Run]:
    """Every process of the files that exist, the longest first: two run at a time."""
    both = [*OP_TESTS, "test_traffic.py", "test_executed_training.py"]
    executed = [*both, "test_planted_bugs.py", "test_triton_compile.py"]
    triton = without("triton")
    listed = [
        *(Run(3, executed, architecture(number), triton) for number in architectures),
        Run(1, OP_TESTS, {"TRITON_INTERPRET": "1"}, triton),
        Run(2, ["test_triton_compiled.py"], {}, triton),
        *(
            Run(4, [*both, "test_cuda_ptx.py"], {**CUDA_ON_EXECUTOR, **architecture(number)}, without_any("nvcc"))
            for number in architectures
        ),
        Run(5, ["test_cuda_shim.py"], {}, without_any("g++", "c++")),
        Run(6, ["test_cuda_build.py"], {}, without_any("nvcc")),
    ]
    return [run for run in listed if all((TESTS / file).exists() for file in run.files)]


def carry_out(run: Run) -> Outcome:
    """Run a process to its end, or not at all where it cannot run."""
    if run.reason:
        return Outcome(Counter(), "")
    paths = [str(TESTS / file) for file in run.files]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *paths]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **run.variables}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    counts = Counter[str]()
    for count, word in re.findall(r"(\d+) (passed|failed|errors?|xfailed|xpassed|skipped)\b", last_line(done.stdout)):
        counts[word.removesuffix("s")] += int(count)
    return Outcome(counts, f"ring {run.ring} {run.variables}\n{done.stdout}{done.stderr}" if done.returncode else "")


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1]


def line(ring: int, listed: list[Run], outcomes: list[Outcome]) -> str:
    """What became of a ring's runs; of those on the executor, for which architectures."""
    own = [(run, outcome) for run, outcome in zip(listed, outcomes, strict=True) if run.ring == ring]
    if reason := own[0][0].reason:
        return f"ring {ring}: skipped ({reason})"
    total: Counter[str] = sum((outcome.counts for _, outcome in own), Counter())
    words = ", ".join(f"{count} {word}" for word, count in total.items()) or "no test ran"
    architectures = sorted(int(run.variables.get("FEATHER_PTX_ARCHITECTURE", 0)) for run, _ in own)
    return f"ring {ring}: {words}" + (" (sm_" + ", sm_".join(map(str, architectures)) + ")") * (ring in (3, 4))


def main() -> int:
    """Run the rings and print their lines; 1 if any failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="rings 3 and 4 on four architectures")
    listed = runs(ARCHITECTURES if parser.parse_args().all else ARCHITECTURES[:1])
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        outcomes = list(pool.map(carry_out, listed))
    print("\n".join(outcome.failure for outcome in outcomes if outcome.failure))
    print("\n".join(line(ring, listed, outcomes) for ring in sorted({run.ring for run in listed})))
    return int(any(outcome.failure for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
