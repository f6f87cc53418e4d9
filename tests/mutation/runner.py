"""Mutation test of the GPU kernels: how many mistakes in the compiled code do the tests notice?

    python -m tests.mutation.runner [triton] [cuda] [sources-cpu] [sources-cuda] [--each N] [--only TEXT] [--csv FILE]

``triton`` and ``cuda`` change one instruction of the compiled PTX (tools/ptx_executor/mutation.py). They draw N mutants
of each kernel, with a fixed seed, from all the forms in which it is compiled. A mutant goes through the checks
(``CASES``) that execute its instruction until one fails.

``sources-cpu`` and ``sources-cuda`` make the changes of csrc that sources.py lists.

A mutant that fails no check is a survivor. survivors.csv has a row for each known one, with the reason why no check
can or need notice it. The exit status is 1 if fewer than 90 % of a kind are killed, or a survivor has no row.
"""

from __future__ import annotations

import argparse
import csv
import io
import math
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch

import feather_kernels as fk
from tests.conftest import ptx_executor
from tests.mutation import elementwise, lists, selection
from tests.mutation.cases import Case, one_atomic_a_warp
from tests.simulated_gpu.executed_cuda import plain_name
from tests.simulated_gpu.sanitized_source import Change
from tools.ptx_executor import PtxError, UnknownInstructionError, execution
from tools.ptx_executor.execution import LaunchReport, Program
from tools.ptx_executor.mutation import Mutation, mutations, planted

SURVIVORS = Path(__file__).with_name("survivors.csv")
CASES = [*elementwise.CASES, *lists.CASES, *selection.CASES]
ARCHITECTURE = 90
EACH = 25  # mutants of a kernel
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


class Survivor(NamedTuple):
    """A mutant that no check kills, as survivors.csv lists it. ``kernel`` is a source's path for mutants of sources."""

    kind: str
    kernel: str
    before: str
    after: str
    reason: str


class Reach(NamedTuple):
    """What a case does with a program: the places that it executes, and the blocks of all its launches."""

    case: Case
    places: set[int]
    blocks: int


@contextmanager
def recorded() -> Iterator[tuple[list[LaunchReport], list[tuple[Program, LaunchReport]]]]:
    """The reports of launches, which checks clear, and all launches with their programs."""
    reports: list[LaunchReport] = []
    launches: list[tuple[Program, LaunchReport]] = []
    launch = Program.launch

    def launch_and_record(self: Program, *arguments: Any, **options: Any) -> LaunchReport:
        report = launch(self, *arguments, **options)
        one_atomic_a_warp([report], "smallest_above_kernel")
        launches.append((self, report))
        reports.append(report)
        return report

    with mock.patch.object(Program, "launch", launch_and_record):
        yield reports, launches


@contextmanager
def executor(kind: str, *build: Any) -> Iterator[None]:
    """The backend on the PTX executor. A launch of many more steps than any needs counts as endless."""
    if kind == "cuda":
        from tests.simulated_gpu.executed_cuda import executed

        chosen = executed(ARCHITECTURE, *build)
    else:
        chosen = ptx_executor(ARCHITECTURE)
    with mock.patch.object(execution, "MAX_STEPS", MOST_STEPS), chosen, fk.use_backend(kind):
        yield


def error_of(case: Case, reports: list[LaunchReport]) -> Exception | None:
    """The error by which a case fails, or None. Others, of our tools, are raised."""
    reports.clear()
    try:
        case.check(reports)
    except UnknownInstructionError:
        raise
    except (AssertionError, PtxError, RuntimeError, TypeError, ValueError) as error:
        return error
    return None


def cases_for(backend: str) -> list[Case]:
    return [case for case in CASES if backend in case.backends]


def check_unchanged(cases: Iterable[Case], reports: list[LaunchReport]) -> None:
    """Raises if a case fails on kernels without a mutant."""
    for case in cases:
        if error := error_of(case, reports):
            raise AssertionError(f"{case.name} fails on unchanged kernels") from error


def reaches(
    kind: str, reports: list[LaunchReport], launches: list[tuple[Program, LaunchReport]]
) -> dict[Program, list[Reach]]:
    """Of each program the cases that launch it; those with the fewest blocks first. Unchanged kernels pass them all."""
    found: dict[Program, list[Reach]] = defaultdict(list)
    for case in cases_for(kind):
        launches.clear()
        check_unchanged([case], reports)
        blocks = sum(math.prod(report.grid) for _, report in launches)
        places: dict[Program, set[int]] = defaultdict(set)
        for program, report in launches:
            places[program] |= report.executed
        for program, own in places.items():
            found[program].append(Reach(case, own, blocks))
    launches.clear()
    return {program: sorted(found[program], key=lambda reach: (reach.blocks, reach.case.name)) for program in found}


def possible_mutants(found: dict[Program, list[Reach]]) -> dict[str, list[tuple[Program, Mutation]]]:
    """By the name of a kernel, those of all the forms in which it is compiled."""
    possible: dict[str, list[tuple[Program, Mutation]]] = defaultdict(list)
    for program in found:
        name = plain_name(program.kernel.name)
        possible[name] += [(program, mutation) for mutation in mutations(program)]
    return possible


def ptx_results(kind: str, each: int, only: str) -> Iterator[Result]:
    """Draw mutants of every kernel of a backend and run them."""
    with executor(kind), recorded() as (reports, launches):
        found = reaches(kind, reports, launches)
        for name, drawn in possible_mutants(found).items():
            if only not in name:
                continue
            for program, mutation in random.Random(SEED).sample(drawn, min(each, len(drawn))):
                cases = [reach.case for reach in found[program] if mutation.place in reach.places]
                with planted(program, mutation):
                    case, how = killed_by(cases, reports)
                launches.clear()
                yield Result(kind, name, mutation.before, mutation.after, case, how)
        check_unchanged(cases_for(kind), reports)  # no mutant has changed what the checks compare with


def killed_by(cases: Iterable[Case], reports: list[LaunchReport]) -> tuple[str, str]:
    """The first case that fails and the class of its error; empty where none does."""
    for case in cases:
        if error := error_of(case, reports):
            return case.name, type(error).__name__
    return "", ""


def source_results(kind: str, each: int, only: str) -> Iterator[Result]:
    """Run the mutants of sources, each compiled, for one processor."""
    from tests.mutation import sources

    if kind == "sources-cpu":
        outcomes = sources.cpu_outcomes([c for c in sources.CPU if only in c.path])
    else:
        outcomes = cuda_outcomes([c for c in sources.CUDA if only in c.path])
    for change, case, how in outcomes:
        yield Result(kind, *described(change), case, how)


def described(change: Change) -> tuple[str, str, str]:
    """A change of a source as results name it: its path, and its text before and after on one line."""
    return change.path, " ".join(change.old.split()), " ".join(change.new.split())


def cuda_outcomes(changes: list[Change]) -> Iterator[tuple[Change, str, str]]:
    """Each change with the case that fails on it on the PTX executor, and how; empty for a survivor."""
    from tests.simulated_gpu import shipped_build

    with executor("cuda"), recorded() as (reports, _):
        check_unchanged(cases_for("cuda"), reports)
    for change in changes:
        with TemporaryDirectory() as folder:
            build = shipped_build.changed(change, ARCHITECTURE, Path(folder))
        with executor("cuda", *build), recorded() as (reports, _):
            yield change, *killed_by(cases_for("cuda"), reports)


def known_survivors() -> list[Survivor]:
    """The rows of survivors.csv."""
    with SURVIVORS.open(newline="") as file:
        return [Survivor(**row) for row in csv.DictReader(file)]


def summary(results: list[Result], known: list[Survivor]) -> tuple[list[str], bool]:
    """Lines to print for one kind, and whether it is good enough."""
    killed = sum(bool(result.killed_by) for result in results)
    explained = {survivor[:4] for survivor in known if survivor.reason}
    unexplained = [result for result in results if survived(result) and result[:4] not in explained]
    lines = [f"{results[0].kind}: {killed} of {len(results)} mutants killed ({killed / len(results):.1%})"]
    lines += [f"  {count:5} by {how}" for how, count in Counter(r.how for r in results if r.how).most_common()]
    lines += [f"  not explained in {SURVIVORS.name}: {row(result)}" for result in unexplained]
    return lines, killed >= WANTED * len(results) and not unexplained


def survived(result: Result) -> bool:
    return not result.killed_by


def row(result: Result) -> str:
    """The line of survivors.csv that a survivor needs, up to the reason."""
    line = io.StringIO()
    csv.writer(line, lineterminator="").writerow([*result[:4], ""])
    return line.getvalue()


def run_kind(kind: str, each: int, only: str) -> list[Result]:
    """Its results; survivors are printed as they are found."""
    results = []
    for result in KINDS[kind](each, only):
        results.append(result)
        if survived(result):
            print(f"survived: {row(result)}", flush=True)
    return results


def main() -> int:
    """Run the kinds that were asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", help=f"of {', '.join(KINDS)}; default: all")
    parser.add_argument("--each", type=int, default=EACH, help="PTX mutants of a kernel (default %(default)s)")
    parser.add_argument("--only", default="", help="kernels, or sources, whose name contains this")
    parser.add_argument("--csv", type=Path, help="write every mutant with what became of it")
    options = parser.parse_args()
    if unknown := set(options.kinds) - set(KINDS):
        parser.error(f"kinds must be of {', '.join(KINDS)}, got {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)
    known, good = known_survivors(), True
    everything: list[Result] = []
    for kind in options.kinds or KINDS:
        try:
            results = run_kind(kind, options.each, options.only)
        except pytest.skip.Exception as missing:
            print(f"{kind}: cannot run ({missing})")
            good = False
            continue
        if not results:
            parser.error(f"only must be a part of a name of {kind}, got {options.only!r}")
        lines, enough = summary(results, known)
        print("\n".join(lines), flush=True)
        everything, good = everything + results, good and enough
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file).writerows([Result._fields, *everything])
    return int(not good)


KINDS: dict[str, Callable[[int, str], Iterator[Result]]] = {
    "triton": partial(ptx_results, "triton"),
    "cuda": partial(ptx_results, "cuda"),
    "sources-cpu": partial(source_results, "sources-cpu"),
    "sources-cuda": partial(source_results, "sources-cuda"),
}


if __name__ == "__main__":
    sys.exit(main())
