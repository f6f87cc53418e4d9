"""results.csv and layers.csv: what every cell of a grid came to. Table and figures are made from these two alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from feather_kernels.cli.errors import InputError
from feather_kernels.cli.train import run_folder

if TYPE_CHECKING:
    from feather_kernels.cli.compare.folder import GridFolder
    from feather_kernels.cli.compare.grid import Cell

RESULTS, LAYERS = "results.csv", "layers.csv"
FINISHED, FAILED, OPEN = "finished", "failed", "open"


@dataclass(frozen=True)
class Result:
    """A cell: which one, and, where ``status`` is "finished", what it came to.

    ``sparsity`` is what was asked for, ``zeros`` the fraction that the finalized model has; ``test_accuracy`` is a
    fraction after the last epoch, ``seconds`` of training and evaluation. ``note`` is why a cell has failed.
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
    note: str = ""


@dataclass(frozen=True)
class Layer:
    """Zeros of one layer in the finalized model of a cell; ``numel`` is the size of its weight."""

    label: str
    sparsity: float
    seed: int
    layer: str
    numel: int
    zeros: int


Row = TypeVar("Row", Result, Layer)
_PARSERS: dict[str, Callable[[str], Any]] = {
    "str": str,
    "int": int,
    "float": float,
    "float | None": lambda text: float(text) if text else None,
}


def collect(folder: GridFolder, cells: Sequence[Cell], failures: Mapping[str, str]) -> list[Result]:
    """Read what the cells came to and write both files; ``failures`` gives reasons by the name of the cell.

    Raises:
        InputError: a file of a finished run is damaged.
    """
    results, layers = [], []
    for cell in cells:
        run = folder.run_of(cell)
        config = cell.config
        known = (cell.label, config.method, config.data_name, config.model, config.epochs, config.sparsity, config.seed)
        if not run.finished:
            note = failures.get(cell.name, "")
            results.append(Result(*known, FAILED if cell.name in failures else OPEN, note=note))
            continue
        try:
            epochs = _rows(run.path / run_folder.METRICS)
            own = [
                Layer(cell.label, config.sparsity, config.seed, row["layer"], int(row["numel"]), int(row["zeros"]))
                for row in _rows(run.path / run_folder.LAYERS)
            ]
            zeros = sum(layer.zeros for layer in own) / sum(layer.numel for layer in own)
            seconds = sum(float(row["seconds"]) for row in epochs)
            results.append(Result(*known, FINISHED, float(epochs[-1]["test_accuracy"]), zeros, seconds))
            layers += own
        except (KeyError, IndexError, ValueError, ZeroDivisionError) as error:
            raise InputError(
                f"{run.path}: {run_folder.METRICS} and {run_folder.LAYERS} must be whole: {error}"
            ) from error
    _write(folder.path / RESULTS, Result, results)
    _write(folder.path / LAYERS, Layer, layers)
    return results


def read_results(folder: Path) -> list[Result]:
    """results.csv; raises InputError unless it is one with at least one cell."""
    return _read(folder / RESULTS, Result)


def read_layers(folder: Path) -> list[Layer]:
    """layers.csv, empty before the first cell has finished; raises InputError unless it is one."""
    return _read(folder / LAYERS, Layer)


def _write(path: Path, kind: type[Row], rows: Sequence[Row]) -> None:
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    writer.writerows(asdict(row) for row in rows)
    run_folder.write_file(path, text.getvalue().encode())


def _read(path: Path, kind: type[Row]) -> list[Row]:
    if not path.is_file():
        raise InputError(f"--table must be the folder of a grid, got {str(path.parent)!r}: no {path.name}")
    parsers = {field.name: _PARSERS[str(field.type)] for field in fields(kind)}
    try:
        return [kind(**{name: parse(row[name]) for name, parse in parsers.items()}) for row in _rows(path)]
    except (KeyError, TypeError, ValueError) as error:
        wanted = ", ".join(parsers)
        raise InputError(f"--table needs a {path.name} with the columns {wanted}, got {path}: {error}") from error


def _rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))
