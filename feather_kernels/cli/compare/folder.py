"""The folder of a grid: which grid it holds, its cells, and the lock that keeps other comparisons out."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from feather_kernels.cli.errors import InputError
from feather_kernels.cli.train import run_folder
from feather_kernels.cli.train.run_folder import RunFolder

if TYPE_CHECKING:
    from feather_kernels.cli.compare.grid import Cell

GRID = "grid.json"
RESULTS, LAYERS = "results.csv", "layers.csv"
CELLS, LOGS = "cells", "logs"  # folders
LOCK, CELLS_LOCK = ".compare.lock", ".cells.lock"
LOCKS = {LOCK, CELLS_LOCK}


class GridFolder:
    """An existing folder of a grid, with a run folder for each cell that has begun.

    Attributes:
        path: the folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def run_of(self, cell: Cell) -> RunFolder:
        """The run folder of a cell, whether it exists or not."""
        return RunFolder(self.path / CELLS / cell.name)

    def log_of(self, cell: Cell) -> Path:
        """The file with all that the processes of a cell have printed."""
        return self.path / LOGS / f"{cell.name}.log"

    @property
    def has_grid(self) -> bool:
        """Whether a ``compare`` has begun here; a copy of the results alone has none."""
        return (self.path / GRID).is_file()

    def check(self, cells: Sequence[Cell]) -> None:
        """Raise InputError unless the grid of ``cells`` may begin or continue here; call it while it is locked.

        It may if the folder is empty, holds that grid or a part of it, or holds results without the runs that they came
        from. Whether those results belong to the grid, ``results.read_finished`` checks.
        """
        file = self.path / GRID
        if not self.has_grid:
            others = {path.name for path in self.path.iterdir()} - {*LOCKS, f"{GRID}.tmp"}
            if others and (RESULTS not in others or CELLS in others):
                raise InputError(
                    f"{self.path} must be a new folder, or one with this grid or its results: it has {min(others)}; "
                    "choose another folder with --out"
                )
            return
        try:
            difference = _difference(json.loads(file.read_text()), json.loads(_to_json(cells)))
        except (ValueError, AttributeError) as error:
            raise InputError(f"--out needs a readable {GRID}, got {file}: {error}") from error
        if difference:
            raise InputError(f"{self.path} holds another grid ({difference}); choose another folder with --out")

    def claim(self, cells: Sequence[Cell]) -> None:
        """Make this the folder of the grid of ``cells``, which ``check`` has let pass; some may be new in it."""
        content = _to_json(cells) + "\n"
        if not self.has_grid or (self.path / GRID).read_text() != content:
            run_folder.write_file(self.path / GRID, content.encode())
        for name in (CELLS, LOGS):
            (self.path / name).mkdir(exist_ok=True)

    @contextmanager
    def locked(self) -> Iterator[int]:
        """Keep other ``compare``s out; yields a file descriptor that each cell must inherit.

        The cells of a killed ``compare`` end by themselves at the end of a step. Until then they hold the second lock,
        for which this waits.

        Raises:
            InputError: another ``compare`` is running in this folder.
        """
        with (self.path / LOCK).open("w") as own, (self.path / CELLS_LOCK).open("w") as shared:
            if not _lock(own.fileno()):
                raise InputError(f"--out {self.path}: another compare is running in this folder")
            if not _lock(shared.fileno()):
                print("waiting for the cells of a killed compare to stop", flush=True)
                while not _lock(shared.fileno()):
                    time.sleep(0.2)
            os.set_inheritable(shared.fileno(), True)
            yield shared.fileno()


def open_folder(path: Path) -> GridFolder:
    """The folder, created if it does not exist; raises InputError if the path is a file or lies in one."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise InputError(f"--out must be a folder, got {str(path)!r}: it is a file, or lies in one") from error
    return GridFolder(path)


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _to_json(cells: Sequence[Cell]) -> str:
    return json.dumps({cell.name: cell.identity() for cell in cells}, indent=2)


def _difference(found: dict[str, dict[str, object]], wanted: dict[str, dict[str, object]]) -> str:
    """The first thing that keeps the wanted grid from continuing the found one, or ""; it may have more cells."""
    for name, options in found.items():
        if name in wanted:
            for option, value in wanted[name].items():
                if options.get(option) != value:
                    return f"{name} has {option} {options.get(option)!r} there, {value!r} here"
    for name in sorted(found.keys() - wanted.keys()):
        return f"it has {name}, which is not in this grid"
    return ""
