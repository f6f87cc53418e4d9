"""The examples run under torchrun, and end with the zeros of one process; the page shows their lines."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGINES = ("ddp", "fsdp2")


def run(engine: str, processes: int) -> tuple[float, str]:
    """The last loss, and the rest of the only line."""
    launch = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*launch, "--nproc-per-node", str(processes), str(ROOT / f"examples/{engine}.py")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    loss, _, zeros = line.partition(", ")
    return float(loss.removeprefix("loss ")), zeros


@pytest.mark.parametrize("engine", ENGINES)
def test_two_processes_end_with_the_zeros_of_one(engine: str) -> None:
    (loss, zeros), (_, alone) = run(engine, 2), run(engine, 1)
    assert zeros == alone == "13,320 of 14,800 prunable weights are zero"
    assert loss < 1.0  # of part of a batch; 2.3 at the beginning


@pytest.mark.parametrize("engine", ENGINES)
def test_the_page_shows_lines_of_the_example(engine: str) -> None:
    lines = {line.strip() for line in (ROOT / f"examples/{engine}.py").read_text().splitlines()}
    (shown,) = re.findall(rf"```py {engine}\n(.*?)```", (ROOT / "docs/distributed.md").read_text(), flags=re.DOTALL)
    assert {line.strip() for line in shown.splitlines()} <= lines
