"""Results as csv in long format: one row for each figure, with all that is needed to read it alone."""

from __future__ import annotations

import csv
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from benchmarks.case import Trial
from benchmarks.measure import Outcome

FOLDER = Path(__file__).parent / "results"
ENVIRONMENT_COLUMNS = (
    *("date", "package", "commit", "backend", "device", "device_name", "cpu", "instruction_sets", "kernels"),
    *("threads", "torch", "triton", "python"),
)
MACHINE_COLUMNS = ("backend", "device", "device_name", "instruction_sets", "kernels", "threads", "torch")
COLUMNS = (
    *ENVIRONMENT_COLUMNS,
    *("size", "case", "operation", "input", "sparsity", "variant", "metric", "value", "unit", "rounds", "note"),
)
TIME, RATIO, MEMORY, GATE = "time_median", "ratio_to_limit", "peak_extra_memory", "gate"
BEYOND = "time_beyond_limit"
Row = Mapping[str, str]
Key = tuple[str, str, str, str, str]  # case, operation, input, sparsity, variant


def rows_of(case: str, trial: Trial, outcomes: Sequence[Outcome], size: str) -> Iterator[dict[str, str]]:
    """The rows of a trial, without the environment's columns."""
    limit = next((outcome for outcome in outcomes if outcome.variant == trial.limit), None)
    limit_time = statistics.median(limit.times) if limit is not None and limit.times else None
    for outcome in outcomes:
        base = {
            "size": size,
            "case": case,
            "operation": trial.operation,
            "input": trial.input,
            "sparsity": "" if trial.sparsity is None else str(trial.sparsity),
            "variant": outcome.variant,
            "rounds": str(len(outcome.times)),
            "note": "" if outcome.failure is None else " ".join(outcome.failure.split())[:300],
        }
        for metric, value, unit in _figures(outcome, limit_time):
            yield {**base, "metric": metric, "value": f"{value:.6g}", "unit": unit}


def _figures(outcome: Outcome, limit_time: float | None) -> Iterator[tuple[str, float, str]]:
    yield GATE, float(outcome.failure is None), "passed"
    if outcome.failure is not None:
        return
    if outcome.times:
        low, median, high = spread(outcome.times)
        yield TIME, median, "s"
        yield "time_p20", low, "s"
        yield "time_p80", high, "s"
        if limit_time:
            yield RATIO, median / limit_time, "x"
            yield BEYOND, median - limit_time, "s"
        if outcome.moved and median > 0:
            yield "bandwidth", outcome.moved / median / 1e9, "GB/s"
    if outcome.peak_memory is not None:
        yield MEMORY, float(outcome.peak_memory), "B"
    for metric, figure in outcome.figures.items():
        yield metric, float(figure.value), figure.unit


def spread(times: Sequence[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    if len(times) == 1:
        return times[0], times[0], times[0]
    fifths = statistics.quantiles(times, n=5, method="inclusive")
    return fifths[0], statistics.median(times), fifths[3]


def append(path: Path, rows: Iterable[Row], environment: Row) -> None:
    """Add rows to a file, which is made where it does not exist; raises ValueError if its columns are others."""
    path.parent.mkdir(parents=True, exist_ok=True)
    begins = not path.exists() or path.stat().st_size == 0
    if not begins:
        read(path)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        if begins:
            writer.writeheader()
        writer.writerows({**environment, **row} for row in rows)


def read(path: Path) -> list[dict[str, str]]:
    """All rows; raises ValueError if the file's columns are not those of this version."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
        if tuple(reader.fieldnames or ()) != COLUMNS:
            raise ValueError(f"{path} must have the columns {', '.join(COLUMNS)}, got {reader.fieldnames}")
    return rows


def read_full(path: Path) -> list[dict[str, str]]:
    """The rows of full size; raises ValueError if there are none, or if they are from several machines."""
    rows = [row for row in read(path) if row["size"] == "full"]
    if not rows:
        raise ValueError(f"{path} must hold results of full size (run without --smoke), got none")
    for column in MACHINE_COLUMNS:
        found = sorted({row[column] for row in rows})
        if len(found) > 1:
            raise ValueError(f"{path} must hold results with one {column}, got {', '.join(found)}")
    return rows


def latest(folder: Path = FOLDER) -> Path:
    """The file that was written last; raises FileNotFoundError if there is none."""
    files = sorted(folder.glob("*.csv"), key=lambda path: (path.stat().st_mtime, path.name))
    if not files:
        raise FileNotFoundError(f"no results in {folder}: run `python -m benchmarks run` first")
    return files[-1]


class Figures:
    """Rows by what was measured; of repeated measurements the last one counts."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self._rows: dict[tuple[Key, str], Row] = {}
        for row in rows:
            key = (row["case"], row["operation"], row["input"], row["sparsity"], row["variant"])
            self._rows[key, row["metric"]] = row

    @property
    def commits(self) -> list[str]:
        """Where the rows that count were measured, in the order of their keys."""
        return list(dict.fromkeys(row["commit"] for row in self._rows.values()))

    def keys(self, case: str, operation: str, variant: str) -> list[Key]:
        """Every input on which a variant went through its gate, whatever came out."""
        wanted = (case, operation, variant)
        return [key for key, metric in self._rows if metric == GATE and (key[0], key[1], key[4]) == wanted]

    def value(self, key: Key, metric: str) -> float | None:
        """A figure, or None where it was not measured."""
        row = self._rows.get((key, metric))
        return None if row is None else float(row["value"])

    def ratio(self, key: Key, other: str) -> float | None:
        """Median time of a variant divided by that of another one on the same input."""
        own, theirs = self.value(key, TIME), self.value((*key[:4], other), TIME)
        return None if own is None or theirs is None else own / theirs
