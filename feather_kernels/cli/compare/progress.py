"""The progress of a comparison: a line when a cell starts or ends, the time left, and a bar on a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

from feather_kernels.cli.train import run_folder

if TYPE_CHECKING:
    from feather_kernels.cli.compare.folder import GridFolder
    from feather_kernels.cli.compare.grid import Cell

LINE_SECONDS = 60.0  # between lines about the time left, without a terminal


class Progress:
    """Epochs done of all cells; the time left is estimated from those since this command began.

    Args:
        folder: of the grid.
        cells: all of them.
        runs_gone: names of finished cells without a run folder.
    """

    def __init__(self, folder: GridFolder, cells: Sequence[Cell], runs_gone: Collection[str]) -> None:
        from rich import progress
        from rich.console import Console

        self.folder, self.cells = folder, cells
        self.total = sum(cell.config.epochs for cell in cells)
        self.done = {cell.name: cell.config.epochs if cell.name in runs_gone else self._epochs(cell) for cell in cells}
        self.at_begin, self.begin = sum(self.done.values()), time.monotonic()
        self.shown = self.begin
        self.bar = progress.Progress(
            progress.TextColumn("epochs"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[text]}"),
            console=Console(),
            transient=True,
            disable=not sys.stdout.isatty(),
        )
        self.task = self.bar.add_task("", total=self.total, completed=self.at_begin, text="")
        self.bar.start()

    def update(self, running: Sequence[Cell]) -> None:
        """Count the epochs of the running cells and show them."""
        before = sum(self.done.values())
        self.done.update({cell.name: self._epochs(cell) for cell in running})
        now = sum(self.done.values())
        if now == before:
            return
        self.bar.update(self.task, completed=now, text=self._left())
        if self.bar.disable and time.monotonic() - self.shown >= LINE_SECONDS:
            self.say(f"epoch {now:,} of {self.total:,}, {self._left()}")
            self.shown = time.monotonic()

    def say(self, text: str) -> None:
        """Print a line above the bar."""
        self.bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
        sys.stdout.flush()

    def close(self) -> None:
        """Remove the bar."""
        if not self.bar.disable:
            self.bar.stop()

    def _epochs(self, cell: Cell) -> int:
        """The number of finished epochs: the rows of metrics.csv below its header."""
        try:
            lines = (self.folder.run_of(cell).path / run_folder.METRICS).read_text().count("\n")
        except FileNotFoundError:
            return 0
        return max(lines - 1, 0)

    def _left(self) -> str:
        done = sum(self.done.values())
        if done == self.at_begin:
            return ""
        seconds = (self.total - done) * (time.monotonic() - self.begin) / (done - self.at_begin)
        hours, minutes = divmod(round(seconds / 60), 60)
        return f"about {f'{hours} h ' if hours else ''}{minutes} min left"
