"""One session of a comparison: runs the cells that are left, several at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from feather_kernels.cli.compare.process import CellProcess

if TYPE_CHECKING:
    from feather_kernels.cli.compare.folder import GridFolder
    from feather_kernels.cli.compare.grid import Cell
    from feather_kernels.cli.compare.progress import Progress

TRIES = 2  # of a cell
POLL_SECONDS = 0.2


class Session:
    """Runs cells in processes until each has finished or has failed twice.

    Args:
        folder: of the grid, locked.
        cells: those to run, in this order.
        jobs: the number of processes at a time.
        threads: the number of CPU threads of each.
        lock: a file descriptor that each process inherits; see ``GridFolder.locked``.
        progress: shows what happens.

    Attributes:
        failures: the reasons of failed cells, by their names.
    """

    def __init__(
        self, folder: GridFolder, cells: Sequence[Cell], jobs: int, threads: int, lock: int, progress: Progress
    ) -> None:
        self.folder, self.jobs, self.threads, self.lock, self.progress = folder, jobs, threads, lock, progress
        self.waiting = deque(cells)
        self.running: list[CellProcess] = []
        self.tries = dict.fromkeys((cell.name for cell in cells), 0)
        self.failures: dict[str, str] = {}

    def run(self, after_cell: Callable[[], None], check: Callable[[], None]) -> None:
        """Run all cells to their end. If something is raised, the running processes are stopped and waited for.

        Args:
            after_cell: called whenever a cell has finished or has failed for good.
            check: called several times per second; may raise.
        """
        try:
            while self.waiting or self.running:
                while self.waiting and len(self.running) < self.jobs:
                    self._start(self.waiting.popleft())
                check()
                time.sleep(POLL_SECONDS)
                self.progress.update([process.cell for process in self.running])
                ended = [process for process in self.running if process.poll() is not None]
                if sum(self._end(process) for process in ended):
                    after_cell()
        finally:
            for process in self.running:
                process.stop()
            for process in self.running:
                process.wait()

    def _start(self, cell: Cell) -> None:
        resumed = self.folder.run_of(cell).path.exists()
        self.running.append(CellProcess(self.folder, cell, self.threads, self.lock))
        self.tries[cell.name] += 1
        self.progress.say(f"{cell.name}: {'resumed' if resumed else 'started'}")

    def _end(self, process: CellProcess) -> bool:
        """Handle the end of a process; returns False if its cell runs once more."""
        self.running.remove(process)
        process.stop()
        cell = process.cell
        if self.folder.run_of(cell).finished:
            self.progress.say(f"{cell.name}: finished")
            return True
        if self.tries[cell.name] < TRIES:
            self.progress.say(f"{cell.name}: {process.reason()}; trying once more")
            self.waiting.appendleft(cell)
            return False
        self.failures[cell.name] = process.reason()
        self.progress.say(f"{cell.name}: failed twice, the last time with: {process.reason()} (see {process.log})")
        return True
