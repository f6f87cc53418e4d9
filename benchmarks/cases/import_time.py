"""What ``import feather_kernels`` adds to ``import torch``, in fresh processes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from benchmarks.case import Case, Setting, Trial, Variant

CHECKOUT = Path(__file__).parents[2]
LIMIT = "import torch"
OURS = "import feather_kernels after torch"
PROGRAMS = {
    LIMIT: "from time import perf_counter as now; start = now(); import torch; print(now() - start)",
    OURS: "import torch; from time import perf_counter as now; start = now(); "
    "import feather_kernels; print(now() - start)",
}


def trials(setting: Setting) -> Iterator[Trial]:
    """One trial; the processes time themselves."""
    variants = {name: partial(timed_program, program) for name, program in PROGRAMS.items()}
    yield Trial("import", "", None, lambda: None, variants, LIMIT, setting.rounds(7), 30.0)


def timed_program(program: str, _: None) -> Variant:
    """A Python process that prints its time in seconds; the package is the one of this checkout."""

    def run() -> float:
        command = [sys.executable, "-c", program]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CHECKOUT)
        return float(done.stdout)

    return Variant(run, 0, lambda seconds: None if seconds > 0 else f"{seconds} s", self_timed=True)


CASE = Case("import", trials)
