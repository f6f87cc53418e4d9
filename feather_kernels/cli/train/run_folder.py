"""The folder of a run, written so that a kill at any moment leaves each file either old or new, never half-written.

A new folder appears under its name by one rename, with config.json and the checkpoint of step 0 already in it. So every
run that exists can be resumed, and two runs that start at the same time never share a folder.
"""

from __future__ import annotations

import csv
import errno
import io
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch

from feather_kernels.cli.errors import InputError

if TYPE_CHECKING:
    from feather_kernels.cli.train.config import TrainConfig

CONFIG = "config.json"
CHECKPOINT = "checkpoint.pt"
METRICS = "metrics.csv"
MODEL = "model.safetensors"
REPORT = "report.md"
LAYERS = "layers.csv"
FIGURE = "report.png"
RESULTS = (MODEL, REPORT, LAYERS, FIGURE)  # written at the end; a run that has all of them is finished


class RunFolder:
    """A run's folder and its files.

    Attributes:
        path: the folder.
        writes: whether this process writes the files; if not, the methods that write do nothing.
    """

    def __init__(self, path: Path, *, writes: bool = True) -> None:
        self.path = path
        self.writes = writes

    @property
    def finished(self) -> bool:
        """Whether all results have been written."""
        return all((self.path / name).is_file() for name in RESULTS)

    def write(self, name: str, content: bytes) -> None:
        """Write a file into the folder, as ``write_file`` does."""
        if self.writes:
            write_file(self.path / name, content)

    def write_config(self, content: dict[str, Any]) -> None:
        """Write config.json."""
        self.write(CONFIG, (json.dumps(content, indent=2) + "\n").encode())

    def write_checkpoint(self, state: dict[str, Any]) -> None:
        """Write checkpoint.pt."""
        buffer = io.BytesIO()
        torch.save(state, buffer)
        self.write(CHECKPOINT, buffer.getvalue())

    def write_metrics(self, columns: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
        """Write metrics.csv, with numbers unrounded."""
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        self.write(METRICS, text.getvalue().encode())

    def read_config(self) -> dict[str, Any]:
        """Read config.json.

        Raises:
            InputError: the file is missing or is not a JSON object.
        """
        return self._read(CONFIG, lambda path: json.loads(path.read_text()))

    def read_checkpoint(self) -> dict[str, Any]:
        """Read checkpoint.pt, with all tensors on the CPU.

        Raises:
            InputError: the file is missing or damaged.
        """
        return self._read(CHECKPOINT, lambda path: torch.load(path, map_location="cpu", weights_only=True))

    def _read(self, name: str, load: Callable[[Path], Any]) -> dict[str, Any]:
        path = self.path / name
        if not path.is_file():
            raise InputError(f"--resume must be the folder of a run, got {str(self.path)!r}: no {name}")
        try:
            content = load(path)
        except Exception as error:  # a damaged file may raise almost anything
            reason = str(error).strip().split("\n", 1)[0] or type(error).__name__
            raise InputError(f"--resume needs a readable {name}, got {path}: {reason}") from error
        if not isinstance(content, dict):
            raise InputError(f"--resume needs a {name} that holds a dict, got {path}: {type(content).__name__}")
        return content


def write_file(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, flush it to disk and rename it."""
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def check_free(config: TrainConfig) -> None:
    """Raise InputError if the run folder cannot be created: its name is used, or ``--runs`` cannot be written to."""
    runs = Path(config.runs)
    if config.name is not None and _is_used(runs / config.name):
        raise _used_error(config)
    existing = next(path for path in (runs, *runs.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        what = "cannot be written to" if existing.is_dir() else "is not a folder"
        raise InputError(f"--runs must be a folder that can be written to, got {config.runs!r}: {existing} {what}")


def create(config: TrainConfig, content: dict[str, Any], checkpoint: dict[str, Any]) -> RunFolder:
    """Create the folder of a new run.

    Args:
        config: the options. Without a name, the run gets ``default_name``, with -2, -3, ... appended if it is taken.
        content: what config.json holds besides the options.
        checkpoint: the state at step 0.

    Raises:
        InputError: the name is used.
        OSError: the folder cannot be written.
    """
    runs = Path(config.runs)
    runs.mkdir(parents=True, exist_ok=True)
    names = [config.name] if config.name is not None else _numbered(config.default_name)
    with TemporaryDirectory(prefix=".new-run-", dir=runs, ignore_cleanup_errors=True) as temporary:
        staging = RunFolder(Path(temporary) / "run")
        staging.path.mkdir()
        staging.write_checkpoint(checkpoint)
        for name in names:
            staging.write_config({"options": asdict(replace(config, name=name)), **content})
            if _rename_to_free(staging.path, runs / name):
                return RunFolder(runs / name)
    raise _used_error(config)


def _numbered(name: str) -> Iterator[str]:
    yield name
    yield from (f"{name}-{number}" for number in itertools.count(2))


def _rename_to_free(source: Path, target: Path) -> bool:
    """Rename a folder unless the target exists (an empty folder may exist); returns whether it was renamed."""
    try:
        source.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            return False
        raise
    return True


def _is_used(path: Path) -> bool:
    return path.exists() and not (path.is_dir() and not any(path.iterdir()))


def _used_error(config: TrainConfig) -> InputError:
    return InputError(
        f"--name must be a new run, got {config.name!r}: {Path(config.runs) / str(config.name)} is already used "
        "(continue it with --resume)"
    )
