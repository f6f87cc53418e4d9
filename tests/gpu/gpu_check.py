"""``make gpu-check``: runs every check of the kernels on this machine's GPU and collects the results in one folder.

    python -m tests.gpu.gpu_check [--name NAME] [--results FOLDER] [--only STEP ...] [--list]

Each step is a process of its own and writes its output to a log; ``summary.md`` and ``summary.json`` list how the steps
ended. The exit status is 0 if every step passed or was skipped with a reason, and 1 if one failed or there is no CUDA
device.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from tests.simulated_gpu import evidence

ROOT = Path(__file__).resolve().parents[2]
PYTHON = sys.executable
PYTEST = (PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider")
RESULTS = "{results}"  # in a command: the results folder
OP_TESTS = tuple(f"tests/{file}" for file in evidence.OP_TESTS)
MARKED = ("tests/training/test_capturable.py", "tests/layers/test_memory.py", "tests/repository/test_benchmarks.py")
HOUR = 3600  # seconds
ON_THE_GPU = {"FEATHER_TEST_DEVICE": "cuda"}
# each tensor in memory of its own, so that memcheck sees where it ends
UNCACHED = {**ON_THE_GPU, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}

BACKENDS = """
import sys, torch
from feather_kernels.backends.registry import registry
offered = registry.availability(torch.device("cuda", 0))
print("\\n".join(f"{name}: {reason or 'available'}" for name, reason in offered.items()))
sys.exit(any(offered.values()))
"""


def no_sanitizer() -> str | None:
    """Why compute-sanitizer cannot be used, or None."""
    if shutil.which("compute-sanitizer") is None:
        return "compute-sanitizer is not on PATH; it is in the CUDA toolkit's bin"
    return None


def sanitizer(tool: str) -> tuple[str, ...]:
    """Some of the op tests on our kernels under one of compute-sanitizer's tools."""
    tests = "(shapes_and_strides or written_into or equals_sorting or caps or hint or histogram) and not reference"
    return ("compute-sanitizer", "--tool", tool, "--error-exitcode", "9", *PYTEST, "-k", tests, *OP_TESTS)


@dataclass(frozen=True)
class Step:
    """A command, what it is for, and why it cannot run here (``obstacle``)."""

    name: str
    purpose: str
    command: tuple[str, ...]
    variables: Mapping[str, str] = field(default_factory=dict)
    obstacle: Callable[[], str | None] = lambda: None
    limit: int = 1800  # seconds


def backend(name: str) -> dict[str, str]:
    """The variable that names the backend of every op."""
    return {"FEATHER_KERNELS_BACKEND": name}


GPU_TESTS = (*PYTEST, "-m", "gpu")
STREAMS, LARGE, EXECUTOR = (f"tests/gpu/test_gpu_{subject}.py" for subject in ("streams", "large", "executor"))
CONTACT = tuple(
    f"tests/simulated_gpu/test_{subject}.py" for subject in ("backend_probe", "chunk_tables", "cuda_graphs")
)
CASES = ("threshold", "backward", "select", "count", "step", "train_step", "evaluation", "memory", "call")
BENCHMARKS = (PYTHON, "-m", "benchmarks", "run", *CASES, "--device", "cuda")
SELFTEST = (PYTHON, "-m", "feather_kernels", "selftest", "--device", "cuda", "--json", f"{RESULTS}/selftest.json")
MEASURED = f"{RESULTS}/benchmarks.csv"
STEPS = (
    Step("backends", "every backend for NVIDIA GPUs runs here", (PYTHON, "-c", BACKENDS)),
    Step("selftest", "what users run", SELFTEST),
    Step("ops", "the op tests on every backend", (*PYTEST, *OP_TESTS), ON_THE_GPU, limit=HOUR),
    Step("graphs", "ops in CUDA graphs, two streams, a second device, no memory", (*GPU_TESTS, STREAMS)),
    Step(
        "training-triton", "captured training step, memory, benchmarked cases", (*GPU_TESTS, *MARKED), backend("triton")
    ),
    Step("training-cuda", "the same on the CUDA C++ backend", (*GPU_TESTS, *MARKED), backend("cuda")),
    Step("contact", "first errors, moving weights, reduce-overhead", (*GPU_TESTS, *CONTACT)),
    Step("large", "more than 2^31 elements", (*GPU_TESTS, LARGE)),
    Step("executor", "each kernel beside its simulation on the PTX executor", (*GPU_TESTS, EXECUTOR), limit=HOUR),
    Step("memcheck", "no access out of bounds", sanitizer("memcheck"), UNCACHED, no_sanitizer, HOUR),
    Step("racecheck", "no race in shared memory", sanitizer("racecheck"), ON_THE_GPU, no_sanitizer, HOUR),
    Step("benchmarks", "speed, and a copy's in the same run", (*BENCHMARKS, "--results", MEASURED), limit=HOUR),
    Step("bandwidth", "GB/s beside that of a copy", (PYTHON, "-m", "tests.gpu.gpu_check", "--bandwidth", MEASURED)),
)


@dataclass(frozen=True)
class Outcome:
    """How a step ended: passed, failed or skipped; the last line of its output, or the reason."""

    step: str
    verdict: str
    seconds: float
    words: str


def carry_out(step: Step, folder: Path) -> Outcome:
    """Run a step; its output goes to NAME.log."""
    reason = step.obstacle()
    if reason is not None:
        return Outcome(step.name, "skipped", 0.0, reason)
    command = [word.replace(RESULTS, str(folder)) for word in step.command]
    begin = time.perf_counter()
    with (folder / f"{step.name}.log").open("w") as log:
        print(f"$ {' '.join(command)}", file=log, flush=True)
        try:
            done = subprocess.run(
                command, cwd=ROOT, env=environment(step), stdout=log, stderr=subprocess.STDOUT, timeout=step.limit
            )
            ending = None if done.returncode == 0 else f"exit status {done.returncode}: "
        except subprocess.TimeoutExpired:
            ending = f"stopped after {step.limit} s: "
        except OSError as error:
            ending = f"{error}: "
    seconds = time.perf_counter() - begin
    words = last_line((folder / f"{step.name}.log").read_text(errors="replace"))
    return Outcome(step.name, "passed" if ending is None else "failed", seconds, f"{ending or ''}{words}")


def environment(step: Step) -> dict[str, str]:
    """This process's variables without those that choose what is tested, and the step's."""
    inherited = {
        key: value for key, value in os.environ.items() if not key.startswith(("FEATHER_", "TRITON_INTERPRET"))
    }
    return {**inherited, "PYTHONPATH": str(ROOT), **step.variables}


def last_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[-1].strip("= ")


def machine() -> dict[str, str]:
    """The GPU and the versions of everything between it and the package."""
    import feather_kernels
    from benchmarks.environment import commit

    properties = torch.cuda.get_device_properties(0)
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": f"{properties.name}, sm_{properties.major}{properties.minor}, {torch.cuda.device_count()} in all",
        "memory": f"{properties.total_memory / 1e9:.1f} GB",
        "driver": first_line("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda})",
        "nvcc": first_line("nvcc", "--version", pattern="release"),
        "python": platform.python_version(),
        "feather_kernels": f"{feather_kernels.__version__} {commit()}".strip(),
    }


def first_line(*command: str, pattern: str = "") -> str:
    """The first line of a program's output with the pattern; empty where there is none."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return next((line.strip() for line in done.stdout.splitlines() if pattern in line), "")


def summary(facts: Mapping[str, str], outcomes: Sequence[Outcome]) -> str:
    """The summary as Markdown."""
    purposes = {step.name: step.purpose for step in STEPS}
    lines = ["# make gpu-check", "", *(f"- {key}: {value}" for key, value in facts.items()), ""]
    lines += ["| step | what | verdict | seconds | last words |", "|---|---|---|---|---|"]
    for outcome in outcomes:
        cells = (outcome.step, purposes.get(outcome.step, ""), outcome.verdict, f"{outcome.seconds:.0f}", outcome.words)
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    counts = {verdict: sum(o.verdict == verdict for o in outcomes) for verdict in ("passed", "failed", "skipped")}
    return "\n".join([*lines, "", ", ".join(f"{count} {verdict}" for verdict, count in counts.items())]) + "\n"


def write_summary(folder: Path, facts: Mapping[str, str], outcomes: Sequence[Outcome]) -> None:
    """summary.md and summary.json, after each step, so that an interrupted run leaves what is known."""
    (folder / "summary.md").write_text(summary(facts, outcomes))
    record = {"machine": dict(facts), "steps": [asdict(outcome) for outcome in outcomes]}
    (folder / "summary.json").write_text(json.dumps(record, indent=1) + "\n")


def show_bandwidth(path: Path) -> int:
    """A line for each variant that was timed, the copies among them; 1 if there is none."""
    from benchmarks.results import RATIO, read_full

    measured: dict[tuple[str, ...], dict[str, float]] = {}
    for row in read_full(path):
        key = tuple(row[column] for column in ("case", "operation", "input", "sparsity", "variant"))
        measured.setdefault(key, {})[row["metric"]] = float(row["value"])
    lines = [
        f"{figures['bandwidth']:8.0f} GB/s {figures.get(RATIO, math.nan):8.2f} of the limit's time  {', '.join(key)}"
        for key, figures in measured.items()
        if "bandwidth" in figures
    ]
    print("\n".join([*lines, f"{len(lines)} variants of {path.name}"]))
    return int(not lines)


def results_folder(base: Path, name: str) -> Path:
    """A new folder gpu-DATE-NAME."""
    label = re.sub(r"[^A-Za-z0-9.]+", "-", name).strip("-") or "unnamed"
    stem = f"gpu-{datetime.date.today().isoformat()}-{label}"
    for index in range(1, 1000):
        folder = base / (stem if index == 1 else f"{stem}-{index}")
        if not folder.exists():
            folder.mkdir(parents=True)
            return folder
    raise FileExistsError(f"{base / stem} and 999 more are there")


def no_device() -> str | None:
    """Why nothing can be checked here, or None."""
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    if torch.version.hip is not None:
        return "torch is built for AMD's GPUs"
    return None if torch.cuda.is_available() else "torch finds none (no driver, or no GPU)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the steps; see the module's docstring."""
    names = [step.name for step in STEPS]
    parser = argparse.ArgumentParser(prog="gpu-check", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--name", help="in the results folder's name (default: the device's)")
    parser.add_argument("--results", type=Path, default=ROOT / "results", help="where the folder is made")
    parser.add_argument("--only", nargs="+", choices=names, metavar="STEP", help=f"some of: {', '.join(names)}")
    parser.add_argument("--list", action="store_true", help="print the steps")
    parser.add_argument("--bandwidth", type=Path, metavar="CSV", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.list:
        print("\n".join(f"{step.name:16} {step.purpose}" for step in STEPS))
        return 0
    if options.bandwidth is not None:
        return show_bandwidth(options.bandwidth)
    reason = no_device()
    if reason is not None:
        print(f"gpu-check needs a CUDA device: {reason}", file=sys.stderr)
        return 1
    folder = results_folder(options.results.resolve(), options.name or torch.cuda.get_device_name(0))
    return check([step for step in STEPS if not options.only or step.name in options.only], folder, machine())


def check(steps: Sequence[Step], folder: Path, facts: Mapping[str, str]) -> int:
    """Run steps one after the other, print a line for each, write the summary; 1 if one failed."""
    print("\n".join(f"{key}: {value}" for key, value in facts.items()))
    outcomes: list[Outcome] = []
    for step in steps:
        print(f"{step.name:16} ", end="", flush=True)
        outcomes.append(carry_out(step, folder))
        print(f"{outcomes[-1].verdict:8}{outcomes[-1].seconds:6.0f} s  {outcomes[-1].words}", flush=True)
        write_summary(folder, facts, outcomes)
    print(f"written to {folder}")
    return int(any(outcome.verdict == "failed" for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main())
