"""results.csv and layers.csv: the outcome of every cell of a grid.

Table and figures are made from these two files alone, and a comparison continues from them where the folders of its
runs are gone.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from feather_kernels.cli.compare.folder import LAYERS, RESULTS, GridFolder
from feather_kernels.cli.compare.grid import cell_name
from feather_kernels.cli.errors import InputError
from feather_kernels.cli.train import run_folder

if TYPE_CHECKING:
    from feather_kernels.cli.compare.grid import Cell

FINISHED, FAILED, OPEN = "finished", "failed", "open"


@dataclass(frozen=True)
class Result:
    """One row of results.csv: a cell, and its outcome if ``status`` is "finished".

    Attributes:
        label, method, data, model, epochs, sparsity, seed: identify the cell; ``sparsity`` is the one asked for.
        status: "finished", "failed" or "open".
        test_accuracy: a fraction, after the last epoch.
        zeros: the fraction of zeros in the finalized model.
        seconds: of training and evaluation.
        fingerprint: changes with any option of the cell, see ``Cell.fingerprint``; "" in files of older versions.
        note: why a cell has failed.

    Raises:
        ValueError: the status is none of the three, or a finished cell lacks its numbers.
    """

    label: str
    method: str
    data: str
    model: str
    epochs: int
    sparsity: float
    seed: int
    status: str
    test_accuracy: float | None = None
    zeros: float | None = None
    seconds: float | None = None
    fingerprint: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if self.status not in (FINISHED, FAILED, OPEN):
            raise ValueError(f"status must be {FINISHED}, {FAILED} or {OPEN}, got {self.status!r}")
        if self.status == FINISHED and None in (self.test_accuracy, self.zeros, self.seconds):
            raise ValueError(f"a finished cell must have test_accuracy, zeros and seconds, {self.cell} lacks one")

    @property
    def cell(self) -> str:
        """The name of its cell."""
        return cell_name(self.label, self.sparsity, self.seed)


@dataclass(frozen=True)
class Layer:
    """One row of layers.csv: the zeros of a layer in the finalized model of a cell.

    Attributes:
        label, sparsity, seed: identify the cell.
        layer: its name in the model.
        numel: the size of its weight.
        zeros: how many of them are zero.
    """

    label: str
    sparsity: float
    seed: int
    layer: str
    numel: int
    zeros: int

    @property
    def cell(self) -> str:
        """The name of its cell."""
        return cell_name(self.label, self.sparsity, self.seed)


@dataclass(frozen=True)
class Outcome:
    """A finished cell: its row in results.csv and its rows in layers.csv."""

    result: Result
    layers: list[Layer]


Row = TypeVar("Row", Result, Layer)
_PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "float | None": lambda text: float(text) if text else None,
}
_OPTIONAL = {"fingerprint"}  # columns that files of older versions lack


def read_finished(folder: GridFolder, cells: Sequence[Cell]) -> dict[str, Outcome]:
    """Outcomes of the finished cells in results.csv, by the names of the cells; empty without that file.

    Raises:
        InputError: a file is damaged, or a row was not made by a cell of this grid. Nothing has been written then.
    """
    if not (folder.path / RESULTS).is_file():
        return {}
    results = _read("--out", folder.path / RESULTS, Result)
    _check_rows(folder, cells, results)
    fingerprints = {cell.name: cell.fingerprint for cell in cells}
    finished = {
        result.cell: Outcome(replace(result, fingerprint=fingerprints[result.cell]), [])
        for result in results
        if result.status == FINISHED
    }
    if finished:
        for layer in _read("--out", folder.path / LAYERS, Layer):
            if layer.cell in finished:
                finished[layer.cell].layers.append(layer)
    for name, outcome in finished.items():
        if not outcome.layers:
            raise InputError(f"--out needs the layers of every finished cell, {folder.path / LAYERS} lacks {name}")
    return finished


def collect(
    folder: GridFolder, cells: Sequence[Cell], before: Mapping[str, Outcome], failures: Mapping[str, str]
) -> list[Result]:
    """Write both files anew and return the rows of results.csv.

    Args:
        folder: holds the runs of the cells.
        cells: of the grid, in the order of the rows.
        before: outcomes of cells whose runs may be gone, by the names of the cells.
        failures: reasons of failed cells, by their names.

    Raises:
        InputError: a file of a finished run is damaged.
    """
    results, layers = [], []
    for cell in cells:
        outcome = _outcome(folder, cell) if folder.run_of(cell).finished else before.get(cell.name)
        if outcome is None:
            status = FAILED if cell.name in failures else OPEN
            results.append(Result(**_identity(cell), status=status, note=failures.get(cell.name, "")))
        else:
            results.append(outcome.result)
            layers += outcome.layers
    _write(folder.path / LAYERS, Layer, layers)  # first: a row of results.csv never lacks its layers
    _write(folder.path / RESULTS, Result, results)
    return results


def read_results(folder: Path) -> list[Result]:
    """The rows of results.csv; raises InputError if the file is missing or damaged."""
    return _read("--table", folder / RESULTS, Result)


def read_layers(folder: Path) -> list[Layer]:
    """The rows of layers.csv, none before a cell has finished; raises InputError if it is missing or damaged."""
    return _read("--table", folder / LAYERS, Layer)


def _identity(cell: Cell) -> dict[str, Any]:
    """The columns that identify a cell."""
    config = cell.config
    return {
        "label": cell.label,
        "method": config.method,
        "data": config.data_name,
        "model": config.model,
        "epochs": config.epochs,
        "sparsity": config.sparsity,
        "seed": config.seed,
        "fingerprint": cell.fingerprint,
    }


def _outcome(folder: GridFolder, cell: Cell) -> Outcome:
    """The outcome of a finished run, from the files of its folder."""
    run, config = folder.run_of(cell), cell.config
    try:
        epochs = _rows(run.path / run_folder.METRICS)
        layers = [
            Layer(cell.label, config.sparsity, config.seed, row["layer"], int(row["numel"]), int(row["zeros"]))
            for row in _rows(run.path / run_folder.LAYERS)
        ]
        result = Result(
            **_identity(cell),
            status=FINISHED,
            test_accuracy=float(epochs[-1]["test_accuracy"]),
            zeros=sum(layer.zeros for layer in layers) / sum(layer.numel for layer in layers),
            seconds=sum(float(row["seconds"]) for row in epochs),
        )
    except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
        raise InputError(
            f"{run.path}: {run_folder.METRICS} and {run_folder.LAYERS} must be complete: {error}"
        ) from error
    return Outcome(result, layers)


def _check_rows(folder: GridFolder, cells: Sequence[Cell], results: Sequence[Result]) -> None:
    """Raise InputError unless each row was made by another cell of this grid."""
    path, wanted = folder.path / RESULTS, {cell.name: cell for cell in cells}
    names = [result.cell for result in results]
    strangers = [name for name in names if name not in wanted]
    if strangers:
        raise InputError(f"--out must have results of this grid, got {path}: the grid has no {', '.join(strangers)}")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise InputError(f"--out must have one row for each cell, got {path} with more than one of {', '.join(twice)}")
    for result in results:
        cell = wanted[result.cell]
        vouched = folder.has_grid and not result.fingerprint  # by grid.json for a row of an older version
        for column, value in _identity(cell).items():
            found = getattr(result, column)
            if found != value and not (vouched and column == "fingerprint"):
                hint = _fingerprint_hint(cell, found) if column == "fingerprint" else ""
                raise InputError(
                    f"--out must have results of this grid, got {path}: {cell.name} has {column} {found!r} there and "
                    f"{value!r} here{hint}"
                )


def _fingerprint_hint(cell: Cell, found: str) -> str:
    options = ", ".join(f"{name} {value}" for name, value in cell.portable_identity().items() if value is not None)
    reason = "an option differs" if found else "an older version wrote it"
    return f" ({reason}; if the row was made with {options}, put {cell.fingerprint} there)"


def _write(path: Path, kind: type[Row], rows: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    run_folder.write_file(path, text.getvalue().encode())


def _read(argument: str, path: Path, kind: type[Row]) -> list[Row]:
    if not path.is_file():
        raise InputError(f"{argument} must be the folder of a grid, got {str(path.parent)!r}: no {path.name}")
    parsers = {field.name: _PARSERS[str(field.type)] for field in fields(kind)}
    try:
        return [
            kind(**{name: parse(row[name]) for name, parse in parsers.items() if name in row or name not in _OPTIONAL})
            for row in _rows(path)
        ]
    except (KeyError, TypeError, ValueError) as error:
        wanted = ", ".join(parsers)
        raise InputError(f"{argument} needs a {path.name} with the columns {wanted}, got {path}: {error}") from error


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, restval=""))
