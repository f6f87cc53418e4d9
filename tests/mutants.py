"""Mutation test of the GPU kernels: how much of what could be wrong in the compiled code do the rings' checks see?

    python tests/mutants.py [triton] [cuda] [sources-cpu] [sources-cuda] [--each N] [--only TEXT] [--csv FILE]

``triton`` and ``cuda``: one-instruction mutants of the compiled PTX (``ptx/mutation.py``), N of each kernel that is
launched, drawn with a fixed seed; each runs through every check of ``CASES`` that launches its kernel until
one fails. ``sources-...``: changes of csrc by hand (``source_mutants.py``). A mutant that no check fails on is a
survivor. Exit status 1 if fewer than 90 % of a kind are killed, or a survivor's explanation is not in docs/gpu.md.
"""

from __future__ import annotations

import argparse
import csv
import math
import random
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest import mock

import mutant_elementwise
import mutant_lists
import ptx.execution
import torch
from conftest import ptx_executor
from cuda_shim import Change
from mutant_cases import Case
from ptx.execution import LaunchReport, Program
from ptx.mutation import Mutation, mutations, planted

import feather_kernels as fk

DOCUMENT = Path(__file__).parent.parent / "docs" / "gpu.md"
CASES = [*mutant_elementwise.CASES, *mutant_lists.CASES]
ARCHITECTURE = 90
EACH = 10  # mutants of a kernel
SEED = 2023
WANTED = 0.9  # of the mutants killed
MOST_STEPS = 20_000  # of a launch; the longest of the unchanged kernels takes a fifth of it


class Result(NamedTuple):
    """What became of a mutant: ``killed_by`` is empty for a survivor, ``how`` the class of the error."""

    kind: str
    kernel: str
    before: str
    after: str
    killed_by: str
    how: str


@contextmanager
def recorded() -> Iterator[tuple[list[LaunchReport], Counter[Program]]]:
    """The reports of launches, and how many blocks of each program were launched."""
    reports: list[LaunchReport] = []
    programs: Counter[Program] = Counter()
    launch = Program.launch

    def launch_and_record(self: Program, *arguments: Any, **options: Any) -> LaunchReport:
        report = launch(self, *arguments, **options)
        programs[self] += math.prod(report.grid)
        reports.append(report)
        return report

    with mock.patch.object(Program, "launch", launch_and_record):
        yield reports, programs


@contextmanager
def executor(kind: str, *build: Any) -> Iterator[None]:
    """The backend on the PTX executor, rings 3 and 4. A launch of many more steps than any needs counts as endless."""
    if kind == "cuda":
        from cuda_ptx import executed

        chosen = executed(ARCHITECTURE, *build)
    else:
        chosen = ptx_executor(ARCHITECTURE)
    with mock.patch.object(ptx.execution, "MAX_STEPS", MOST_STEPS), chosen, fk.use_backend(kind):
        yield


def error_of(case: Case, reports: list[LaunchReport]) -> Exception | None:
    """The error with which a case fails, or None."""
    reports.clear()
    try:
        case.check(reports)
    except Exception as error:  # whatever it is, a test would show it
        return error
    return None


def cases_of_programs(kind: str, reports: list[LaunchReport], programs: Counter[Program]) -> dict[Program, list[Case]]:
    """Of each program the cases that launch it, each of which passes; those with the fewest blocks first."""
    found: dict[Program, list[tuple[int, str, Case]]] = defaultdict(list)
    for case in cases_for(kind):
        programs.clear()
        if error := error_of(case, reports):
            raise AssertionError(f"{case.name} fails on unchanged kernels") from error
        for program in programs:
            found[program].append((programs.total(), case.name, case))
    return {program: [case for *_, case in sorted(found[program])] for program in found}


def cases_for(backend: str) -> list[Case]:
    return [case for case in CASES if backend in case.backends]


def ptx_results(kind: str, each: int, only: str) -> Iterator[Result]:
    """Draw the mutants of every program of a backend and run them."""
    with executor(kind), recorded() as (reports, programs):
        for program, cases in cases_of_programs(kind, reports, programs).items():
            name = plain_name(program.kernel.name)
            if only in name:
                possible = mutations(program)
                chosen = random.Random(SEED).sample(possible, min(each, len(possible)))
                for mutation in sorted(chosen, key=lambda chosen: chosen.place):
                    yield ptx_result(kind, name, program, mutation, cases, reports)


def ptx_result(
    kind: str, name: str, program: Program, mutation: Mutation, cases: list[Case], reports: list[LaunchReport]
) -> Result:
    """Run the cases of a mutant's program until one fails."""
    with planted(program, mutation):
        return Result(kind, name, mutation.before, mutation.after, *killed_by(cases, reports))


def killed_by(cases: Iterable[Case], reports: list[LaunchReport]) -> tuple[str, str]:
    """The first case that fails and the class of its error; empty where none does."""
    for case in cases:
        if error := error_of(case, reports):
            return case.name, type(error).__name__
    return "", ""


def source_results(kind: str, each: int, only: str) -> Iterator[Result]:
    """Run the mutants of sources, each compiled, for one processor."""
    import source_mutants

    if kind == "sources-cpu":
        outcomes = source_mutants.cpu_outcomes([c for c in source_mutants.CPU if only in c.path])
    else:
        outcomes = cuda_outcomes([c for c in source_mutants.CUDA if only in c.path])
    for change, case, how in outcomes:
        yield Result(kind, change.path, " ".join(change.old.split()), " ".join(change.new.split()), case, how)


def cuda_outcomes(changes: list[Change]) -> Iterator[tuple[Change, str, str]]:
    """Each change with the case that fails on it in ring 4, and how; empty for a survivor."""
    import cuda_build

    for change in changes:
        with TemporaryDirectory() as folder:
            build = cuda_build.changed(change, ARCHITECTURE, Path(folder))
        with executor("cuda", *build), recorded() as (reports, _):
            yield change, *killed_by(cases_for("cuda"), reports)


def plain_name(name: str) -> str:
    """``histogram_kernel`` of a mangled name."""
    found = re.search(r"[a-z_]+_kernel", name)
    return name if found is None else found[0]


def summary(results: list[Result], explained: str) -> tuple[list[str], bool]:
    """Lines to print for one kind, and whether it is good enough."""
    killed = sum(bool(result.killed_by) for result in results)
    unexplained = [result for result in results if survived(result) and row(result) not in explained]
    lines = [f"{results[0].kind}: {killed} of {len(results)} mutants killed ({killed / len(results):.1%})"]
    lines += [f"  {count:5} by {how}" for how, count in Counter(r.how for r in results if r.how).most_common()]
    lines += [f"  not explained in docs/gpu.md: {row(result)}" for result in unexplained]
    return lines, killed >= WANTED * len(results) and not unexplained


def survived(result: Result) -> bool:
    return not result.killed_by


def row(result: Result) -> str:
    """A survivor as docs/gpu.md names it."""
    return f"| {result.kernel} | `{result.before}` | `{result.after}` |"


def main() -> int:
    """Run the kinds that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], help="default: all")
    parser.add_argument("--each", type=int, default=EACH, help="PTX mutants of a kernel (default %(default)s)")
    parser.add_argument("--only", default="", help="kernels, or sources, whose name contains this")
    parser.add_argument("--csv", type=Path, help="write every mutant with what became of it")
    options = parser.parse_args()
    torch.set_num_threads(1)
    explained, good = DOCUMENT.read_text(), True
    everything: list[Result] = []
    for kind in options.kinds or KINDS:
        results = []
        for result in KINDS[kind](options.each, options.only):
            results.append(result)
            if survived(result):
                print(f"survived: {row(result)}", flush=True)
        lines, enough = summary(results, explained)
        print("\n".join(lines), flush=True)
        everything, good = everything + results, good and enough
    if options.csv:
        with options.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([Result._fields, *everything])
    return int(not good)


KINDS: dict[str, Callable[[int, str], Iterator[Result]]] = {
    "triton": partial(ptx_results, "triton"),
    "cuda": partial(ptx_results, "cuda"),
    "sources-cpu": partial(source_results, "sources-cpu"),
    "sources-cuda": partial(source_results, "sources-cuda"),
}


if __name__ == "__main__":
    sys.exit(main())
