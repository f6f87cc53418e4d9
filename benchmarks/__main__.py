"""The command: ``python -m benchmarks run | bars | table``."""

from __future__ import annotations

import argparse
import datetime
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import backends, bars, results, table
from benchmarks.case import Figure, Setting, Trial
from benchmarks.cases import CASES
from benchmarks.clock import clock_for
from benchmarks.environment import describe
from benchmarks.measure import Outcome, measure


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    options = parser().parse_args(arguments)
    try:
        return int(options.command(options))
    except (FileNotFoundError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parser() -> argparse.ArgumentParser:
    """Commands and their options."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = top.add_subparsers(required=True, metavar="run | bars | table")
    run = commands.add_parser("run", help="measure cases and append the figures to a csv file")
    run.add_argument("cases", nargs="*", metavar="CASE", help=f"any of {', '.join(CASES)} (default: all)")
    run.add_argument("--device", type=torch.device, default=torch.device("cpu"), help="cpu (default) or cuda[:INDEX]")
    run.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    run.add_argument("--instruction-set", metavar="NAME", help="of the C++ backend, e.g. avx2 (default: the widest)")
    run.add_argument("--smoke", action="store_true", help="tiny inputs, one round: shows that everything runs")
    run.add_argument("--results", type=Path, help="csv to append to (default: results/DATE-DEVICE.csv; none for smoke)")
    run.set_defaults(command=run_cases)
    check = commands.add_parser("bars", help="check results against the bars; exit status 1 if one fails")
    check.set_defaults(command=check_bars)
    make = commands.add_parser("table", help="print the measured table, or put it between the markers of a file")
    make.add_argument("--readme", type=Path, help="the file to write to")
    make.set_defaults(command=make_table)
    for command in (check, make):
        command.add_argument("--results", type=Path, help="csv (default: the newest in results/)")
    return top


def run_cases(options: argparse.Namespace) -> int:
    """Measure, print, write; status 1 if a variant of ours or a limit failed its gate."""
    unknown = [name for name in options.cases if name not in CASES]
    if unknown:
        raise ValueError(f"CASE must be one of {', '.join(CASES)}, got {unknown[0]}")
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.instruction_set is not None:
        backends.use_instruction_set(options.instruction_set)
    setting, clock = Setting(options.device, options.smoke), clock_for(options.device)
    environment = describe(options.device)
    path = options.results or (None if options.smoke else default_path(options.device))
    print(", ".join(f"{name} {value}" for name, value in environment.items() if value))
    failed = False
    for name in options.cases or CASES:
        begin = time.perf_counter()
        for trial in CASES[name].trials(setting):
            outcomes = measure(trial, clock)
            print(f"\n{name}: {trial.title}\n{format_outcomes(trial, outcomes)}", flush=True)
            failed |= any(outcome.failure and is_ours(outcome, trial) for outcome in outcomes)
            if path is not None:
                rows = results.rows_of(name, trial, outcomes, "smoke" if options.smoke else "full")
                results.append(path, rows, environment)
        print(f"\n{name} took {time.perf_counter() - begin:.0f} s", flush=True)
    if path is not None:
        print(f"written to {path}")
    return int(failed)


def is_ours(outcome: Outcome, trial: Trial) -> bool:
    """Whether a variant is the package's or the limit, which must not fail; a peer may (no compiler, no memory)."""
    return outcome.variant.startswith("ours[") or outcome.variant == trial.limit


def default_path(device: torch.device) -> Path:
    """A file for today and the kind of device."""
    return results.FOLDER / f"{datetime.date.today().isoformat()}-{device.type}.csv"


def format_outcomes(trial: Trial, outcomes: Sequence[Outcome]) -> str:
    """A line for each variant."""
    figures: dict[str, dict[str, str]] = {outcome.variant: {} for outcome in outcomes}
    for row in results.rows_of("", trial, outcomes, ""):
        figures[row["variant"]][row["metric"]] = row["value"]
    lines = [f"  {'':28}{'median':>12}{'p20':>12}{'p80':>12}{'/ limit':>10}{'GB/s':>8}{'extra MB':>10}{'rounds':>8}"]
    for outcome in outcomes:
        if outcome.failure is not None:
            lines.append(f"  {outcome.variant:28}not timed: {' '.join(outcome.failure.split())[:200]}")
            continue
        own = {metric: float(value) for metric, value in figures[outcome.variant].items()}
        metrics = (results.TIME, "time_p20", "time_p80")
        times = "".join(f"{_milliseconds(own[m])} ms" if m in own else " " * 12 for m in metrics)
        others = ((results.RATIO, 10, 1.0), ("bandwidth", 8, 1.0), (results.MEMORY, 10, 1e-6))
        cells = "".join(f"{own[m] * scale:{w}.3g}" if m in own else " " * w for m, w, scale in others)
        more = "".join(f"; {name.replace('_', ' ')} {_figure(figure)}" for name, figure in outcome.figures.items())
        lines.append(f"  {outcome.variant:28}{times}{cells}{len(outcome.times):8}{more}")
    return "\n".join(lines)


def _milliseconds(seconds: float) -> str:
    value = seconds * 1e3
    return f"{value:9.0f}" if value >= 1000 else f"{value:9.4g}"


def _figure(figure: Figure) -> str:
    scale, unit = {"B": (1e-6, " MB"), "count": (1.0, "")}.get(figure.unit, (1.0, f" {figure.unit}"))
    return f"{figure.value * scale:.4g}{unit}"


def check_bars(options: argparse.Namespace) -> int:
    """Print a verdict for each bar; status 1 if one fails."""
    path = options.results or results.latest()
    verdicts = list(bars.judge(results.read_full(path)))
    print(f"{path}\n{bars.format_verdicts(verdicts)}")
    return int(any(verdict.holds is False for verdict in verdicts))


def make_table(options: argparse.Namespace) -> int:
    """Print the table, or write it into a file."""
    path = options.results or results.latest()
    rows = results.read_full(path)
    made = table.make_table(rows, display(path))
    if options.readme is None:
        print(made)
    else:
        table.check_commits(rows)
        table.insert(made, options.readme)
    return 0


def display(path: Path) -> str:
    """The path from the checkout, where it lies in there."""
    checkout = results.FOLDER.parents[1]
    return str(path.resolve().relative_to(checkout)) if path.resolve().is_relative_to(checkout) else str(path)


if __name__ == "__main__":
    sys.exit(main())
