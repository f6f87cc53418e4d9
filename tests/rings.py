"""The rings that need a process of their own, and a line for each as the last lines of ``make test``.

Ring 1: the op tests on the Triton backend in Triton's interpreter. Ring 2: its kernels compiled ahead of time. Ring 3:
the compiled PTX of the op tests' launches, executed on CPU tensors: for sm_90, or with ``--all`` for four
architectures. See docs/gpu.md.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

TESTS = Path(__file__).parent
OP_TESTS = ["test_threshold.py", "test_select.py", "test_schema.py"]
ARCHITECTURES = (90, 80, 100, 120)  # the first alone without --all


class Run(NamedTuple):
    """One pytest process of a ring."""

    ring: int
    files: list[str]
    variables: dict[str, str]


class Outcome(NamedTuple):
    """How a run ended: its counts by word ("passed", ...), and what to show of it if it failed."""

    counts: Counter[str]
    failure: str


def runs(architectures: tuple[int, ...]) -> list[Run]:
    """Every process, the longest first: two run at a time."""
    executed = [*OP_TESTS, "test_triton_traffic.py", "test_planted_bugs.py", "test_triton_compile.py"]
    return [
        *(Run(3, executed, {"FEATHER_PTX_ARCHITECTURE": str(architecture)}) for architecture in architectures),
        Run(1, OP_TESTS, {"TRITON_INTERPRET": "1"}),
        Run(2, ["test_triton_compiled.py"], {}),
    ]


def carry_out(run: Run) -> Outcome:
    """Run a process to its end."""
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


def main() -> int:
    """Run the rings and print their lines; 1 if any failed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--all", action="store_true", help="ring 3 on four architectures")
    architectures = ARCHITECTURES if parser.parse_args().all else ARCHITECTURES[:1]
    if importlib.util.find_spec("triton") is None:
        print("\n".join(f"ring {ring}: skipped (no triton)" for ring in (1, 2, 3)))
        return 0
    listed = runs(architectures)
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        outcomes = list(pool.map(carry_out, listed))
    print("\n".join(outcome.failure for outcome in outcomes if outcome.failure))
    for ring in (1, 2, 3):
        total = sum(
            (outcome.counts for run, outcome in zip(listed, outcomes, strict=True) if run.ring == ring), Counter()
        )
        words = ", ".join(f"{count} {word}" for word, count in total.items()) or "no test ran"
        print(f"ring {ring}: {words}" + (" (sm_" + ", sm_".join(map(str, sorted(architectures))) + ")") * (ring == 3))
    return int(any(outcome.failure for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
