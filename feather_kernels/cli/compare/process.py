"""A cell as a process of its own, which runs ``feather-kernels train``."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import feather_kernels
from feather_kernels.cli.compare.folder import CELLS, GridFolder
from feather_kernels.cli.compare.grid import OF_THE_SESSION, Cell

# imports the package of the parent process, whatever lies in the current folder or is installed elsewhere
PROGRAM = """
import sys
sys.path[:] = [sys.argv[1], *(path for path in sys.path if path)]
import feather_kernels
del sys.path[0]
from feather_kernels import cli
from feather_kernels.cli.compare.process import end_with_parent
end_with_parent()
sys.exit(cli.main(sys.argv[2:]))
"""


class CellProcess:
    """A running cell.

    Its standard input is a pipe from this process. When the pipe closes, even because this process was killed, the cell
    writes a checkpoint at the end of its step and stops. Ctrl-C does not reach it.

    Args:
        folder: of the grid.
        cell: to start, or to resume if its run folder exists.
        threads: the number of CPU threads.
        lock: a file descriptor that it inherits; see ``GridFolder.locked``.
    """

    def __init__(self, folder: GridFolder, cell: Cell, threads: int, lock: int) -> None:
        self.cell = cell
        self.log = folder.log_of(cell)
        self.log_begin = self.log.stat().st_size if self.log.exists() else 0
        run = folder.run_of(cell).path
        options = ["--resume", str(run)] if run.exists() else _options(cell, folder.path / CELLS)
        root = Path(feather_kernels.__file__).parent.parent
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONUNBUFFERED": "1"}
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", PROGRAM, str(root), "train", *options, "--threads", str(threads)],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                pass_fds=[lock],
                start_new_session=True,
            )

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self.process.poll()

    def stop(self) -> None:
        """Ask it to stop at the end of its step."""
        if self.process.stdin is not None:
            self.process.stdin.close()

    def wait(self) -> None:
        """Wait until it has ended."""
        self.process.wait()

    def reason(self) -> str:
        """Why it failed, in one line: the signal that killed it, or the last line that it printed."""
        code = self.process.returncode
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        with self.log.open("rb") as log:
            log.seek(self.log_begin)
            lines = log.read().decode(errors="replace").split("\n")
        printed = [line.strip() for line in lines if line.strip()]
        return printed[-1] if printed else f"exit code {code}"


def end_with_parent() -> None:
    """Send this process SIGTERM, which stops it at the end of a step, as soon as its standard input ends."""

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def _options(cell: Cell, runs: Path) -> list[str]:
    """The command line of a new run; numbers are written by ``repr``, so that they read back unchanged."""
    options = [f"--runs={runs}", f"--name={cell.name}"]
    for name, value in asdict(cell.config).items():
        if value is not None and name not in OF_THE_SESSION:
            options.append(f"--{name.replace('_', '-')}={value}")
    return options
