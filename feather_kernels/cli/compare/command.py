"""``feather-kernels compare``: from its options to its files."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feather_kernels.cli.compare import figures, results, table
from feather_kernels.cli.compare.folder import RESULTS, GridFolder, open_folder
from feather_kernels.cli.compare.grid import Cell, make_grid, read_grid
from feather_kernels.cli.compare.progress import Progress
from feather_kernels.cli.compare.session import Session
from feather_kernels.cli.errors import InputError
from feather_kernels.cli.interruption import Interrupted, Interruption
from feather_kernels.cli.options import given
from feather_kernels.cli.train import run_folder

if TYPE_CHECKING:
    import argparse

FINISHED, SOME_FAILED, INTERRUPTED = 0, 1, 130  # exit codes
TABLE, ACCURACY, LAYERS = "table.md", "accuracy.png", "layers.png"
DEFAULT_METHODS, DEFAULT_SPARSITIES = ["feather", "hard", "soft", "dense"], [0.9, 0.95, 0.98]


def run(options: argparse.Namespace) -> int:
    """Run a grid, or with ``--table`` redraw the table and figures of a folder; returns the exit code.

    Raises:
        InputError, OSError: an option, the grid or the folder is not what it should be; nothing has been written then.
    """
    world_size = os.environ.get("WORLD_SIZE") or "1"  # set by torchrun and other launchers
    if world_size != "1":
        raise InputError(
            f"compare must run as one process, got WORLD_SIZE={world_size}: start it without a launcher; --jobs sets "
            "how many cells train at the same time"
        )
    rest = given(options)
    path = rest.pop("table", None)
    if path is not None:
        if rest:
            raise InputError(f"--table takes no other option, got {', '.join(rest)}")
        print(write_table(Path(path)), end="")
        return FINISHED
    jobs, threads = rest.pop("jobs", 1), rest.pop("threads", 1)
    for name, value in (("jobs", jobs), ("threads", threads)):
        if value < 1:
            raise InputError(f"--{name} must be at least 1, got {value}")
    out, cells = rest.pop("out", None), _cells(rest)
    folder = open_folder(Path(out if out is not None else _default_folder(rest)))
    with folder.locked() as lock:
        folder.check(cells)
        before = results.read_finished(folder, cells)
        folder.claim(cells)
        return _run(folder, cells, before, jobs, threads, lock)


def write_table(path: Path) -> str:
    """Write table.md, accuracy.png and layers.png from results.csv and layers.csv alone; returns the table.

    Raises:
        InputError: one of them is missing or damaged.
    """
    found = results.read_results(path)
    if not found:
        raise InputError(f"--table needs a {RESULTS} with at least one cell, got {path / RESULTS}")
    layers = results.read_layers(path)
    text = table.to_markdown(found)
    run_folder.write_file(path / TABLE, text.encode())
    run_folder.write_file(path / ACCURACY, figures.draw_accuracy(found))
    run_folder.write_file(path / LAYERS, figures.draw_layers(found, layers))
    return text


def _cells(options: dict[str, Any]) -> list[Cell]:
    """The cells of the grid file, or those that the options span."""
    shared = {name: value for name, value in options.items() if name not in ("grid", "methods", "sparsities", "seeds")}
    if "grid" in options:
        axes = [f"--{name}" for name in ("methods", "sparsities", "seeds") if name in options]
        if axes:
            raise InputError(f"the grid file already lists the cells; leave out {', '.join(axes)}")
        path = Path(options["grid"])
        if not path.is_file():
            raise InputError(f"the grid must be a .toml file, got {options['grid']!r}: no such file")
        return read_grid(path, shared)
    methods, seeds = options.get("methods", DEFAULT_METHODS), options.get("seeds", [0])
    return make_grid(methods, options.get("sparsities", DEFAULT_SPARSITIES), seeds, shared)


def _default_folder(options: dict[str, Any]) -> str:
    return f"runs/{Path(options['grid']).stem if 'grid' in options else 'compare'}"


def _run(
    folder: GridFolder, cells: Sequence[Cell], before: Mapping[str, results.Outcome], jobs: int, threads: int, lock: int
) -> int:
    """Run every cell that is not finished, and write all files anew whenever one ends."""
    runs_gone = [cell.name for cell in cells if cell.name in before and not folder.run_of(cell).finished]
    waiting = [cell for cell in cells if cell.name not in runs_gone and not folder.run_of(cell).finished]
    progress = Progress(folder, cells, runs_gone)
    session = Session(folder, waiting, jobs, threads, lock, progress)
    if runs_gone:
        progress.say(
            f"{len(runs_gone)} of {len(cells)} cells are taken from {folder.path / RESULTS}; their runs are gone"
        )

    def write() -> None:
        results.collect(folder, cells, before, session.failures)
        write_table(folder.path)

    with Interruption() as interruption:
        try:
            write()
            session.run(write, interruption.check)
        except Interrupted:
            print(
                f"interrupted; {folder.path / TABLE} has the cells so far; continue with the same command", flush=True
            )
            return INTERRUPTED
        finally:
            progress.close()
    print(f"\n{(folder.path / TABLE).read_text()}\nresults are in {folder.path}", flush=True)
    return SOME_FAILED if session.failures else FINISHED
