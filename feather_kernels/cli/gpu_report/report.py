"""Runs the parts of a report, each in a process of its own, and writes the report after each."""

from __future__ import annotations

import datetime
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from feather_kernels.cli.errors import InputError
from feather_kernels.cli.gpu_report import page
from feather_kernels.cli.gpu_report.machine import CHECKOUT, anonymous
from feather_kernels.cli.gpu_report.parts import MACHINE, PARTS
from feather_kernels.cli.gpu_report.run_part import SKIPPED

CHILD = (sys.executable, "-m", "feather_kernels.cli.gpu_report.run_part")
TOTAL = 290  # seconds for all parts together
STOPPED = "stopped after"
GRACE = 10  # seconds for a killed process to end


@dataclass(frozen=True)
class Request:
    """What to report on, and where to write the report.

    Attributes:
        folder: of the two files; it is created if it is missing.
        name: part of the names of the files; None for the name of the GPU.
        force: whether to overwrite existing files.
        device, quick: options of the parts.
        child: the command that starts the process of a part; tests have one that runs on a simulator.
        kind: ``page.MEASURED`` or ``page.COMPUTED``.
        patience: a factor on all time limits.
        parts: the names of the parts to run.
    """

    folder: Path
    name: str | None = None
    force: bool = False
    device: str = "cuda:0"
    quick: bool = False
    child: Sequence[str] = CHILD
    kind: str = page.MEASURED
    patience: float = 1.0
    parts: Sequence[str] = tuple(PARTS)


def make(request: Request) -> int:
    """Run all parts, print a line for each and write the files; returns the exit code: 1 if a part failed.

    Raises:
        InputError: the folder cannot be written to, or a file exists and ``force`` is false.
    """
    _check_folder(request.folder)
    outcomes: list[dict[str, Any]] = []
    record: dict[str, Any] = {
        "format": page.FORMAT,
        "kind": request.kind,
        "quick": request.quick,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "machine": {},
        "parts": outcomes,
    }
    files: tuple[Path, Path] | None = None
    if request.name is not None:
        files = _files(request, request.name)
    end = time.monotonic() + TOTAL * request.patience
    for part in request.parts:
        print(f"{part:20} ", end="", flush=True)
        outcome = carry_out(part, request, PARTS[part].limit * request.patience, end - time.monotonic())
        outcomes.append(outcome)
        print(f"{outcome['verdict']:8} {outcome['words']}", flush=True)
        if part == MACHINE:
            record["machine"] = next((row["facts"] for row in outcome.pop("rows") if "facts" in row), {})
        if files is None:
            files = _files(request, record["machine"].get("gpu", "unknown"))
        pending = [{"part": name, "verdict": "not run", "words": ""} for name in request.parts[len(outcomes) :]]
        written = {**record, "parts": [*outcomes, *pending]}
        files[0].write_text(json.dumps(written, indent=1, allow_nan=False) + "\n")
        files[1].write_text(page.report(written))
    if files is not None:
        print(f"written: {files[0]} and {files[1].name}")
    return int(any(outcome["verdict"] == "failed" for outcome in outcomes))


def carry_out(part: str, request: Request, limit: float, left: float = math.inf) -> dict[str, Any]:
    """Run a part and return its verdict and its rows.

    Args:
        part: its name.
        request: the whole report.
        limit: the seconds that the part may take.
        left: the seconds that are left for all parts.
    """
    if left <= 0:
        return {"part": part, "verdict": "skipped", "words": "no time was left", "rows": []}
    begin = time.monotonic()
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        log, file = Path(folder) / "log", Path(folder) / "rows"
        options = [part, str(file), "--device", request.device, *(["--quick"] if request.quick else [])]
        ending = _run([*request.child, *options], log, min(limit, left))
        rows = _read(file)
        last = (log.read_text(errors="replace").strip().splitlines() or ["no output"])[-1] if log.exists() else ""
    skipped = [str(row[SKIPPED]) for row in rows if SKIPPED in row]
    wrong = [row for row in rows if row.get("wrong") is not None]
    if ending is not None and ending.startswith(STOPPED) and left < limit:
        verdict, words = "skipped", "no time was left for all of it"
    elif ending is not None:
        verdict, words = "failed", f"{ending}; last words: {anonymous(last)[:300]}"
    elif skipped:
        verdict, words, rows = "skipped", skipped[0], []
    elif wrong:
        verdict, words = "failed", f"{len(wrong)} of {len(rows)} results wrong"
    else:
        verdict, words = "passed", f"{len(rows)} results" if len(rows) != 1 else "1 result"
    timed = {"seconds": round(time.monotonic() - begin, 1)} if request.kind == page.MEASURED else {}
    return {"part": part, "verdict": verdict, **timed, "words": words, "rows": rows}


def _run(command: Sequence[str], log: Path, limit: float) -> str | None:
    """Run a command to its end or the limit, then kill all that it started; returns what went wrong, or None."""
    variables = {k: v for k, v in os.environ.items() if not k.startswith(("FEATHER_", "TRITON_INTERPRET"))}
    with log.open("w") as output:
        process = subprocess.Popen(
            command, cwd=CHECKOUT if (CHECKOUT / ".git").exists() else log.parent, env=variables,
            stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            return f"{STOPPED} {limit:.0f} s"
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # a process that hangs in the driver does not even die
                process.wait(GRACE)
    if status < 0:
        return f"ended by {signal.Signals(-status).name}"
    return f"exit status {status}" if status else None


def _read(file: Path) -> list[dict[str, Any]]:
    """Read the rows; a killed process may have cut off its last one, which is left out."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        with suppress(json.JSONDecodeError):
            row = json.loads(line)
            rows.append({k: anonymous(v) if isinstance(v, str) else v for k, v in row.items()})
    return rows


def _check_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise InputError(f"--output must be a folder that can be written, got {folder}: {error.strerror}") from error


def _files(request: Request, name: str) -> tuple[Path, Path]:
    """The paths of the JSON and the Markdown file; raises InputError if one exists and ``force`` is false."""
    label = re.sub(r"[^A-Za-z0-9._]+", "-", name).strip("-.") or "unknown"
    files = request.folder / f"gpu-report-{label}.json", request.folder / f"gpu-report-{label}.md"
    for file in files:
        if file.exists() and not request.force:
            raise InputError(f"{file} exists: give --force to overwrite it, or another --output or --name")
    return files
