"""``make gpu-check`` itself, as far as it can be tested without a GPU: steps, summary, exit status."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import results
from benchmarks.cases import CASES
from tests.gpu import gpu_check
from tests.gpu.gpu_check import ROOT, STEPS, Step

PASSING = Step("passing", "says good", (sys.executable, "-c", "print('all is | good')"))
FAILING = Step("failing", "exits", (sys.executable, "-c", "import sys; print('a word'); sys.exit(3)"))
MISSING = Step("missing", "no such program", ("/nonexistent/program",))
SLOW = Step(
    "slow", "is stopped", (sys.executable, "-c", "import time; print('on', flush=True); time.sleep(60)"), limit=2
)
SKIPPED = Step("skipped", "cannot run", ("/nonexistent/program",), obstacle=lambda: "no such tool here")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_is_one_line_and_exit_status_1(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu.gpu_check", "--results", str(tmp_path / "results")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1
    assert done.stdout == ""
    assert re.fullmatch(r"gpu-check needs a CUDA device: torch [^\n]+\n", done.stderr)
    assert not (tmp_path / "results").exists()


def test_every_step_names_what_is_there() -> None:
    assert len({step.name for step in STEPS}) == len(STEPS)
    for step in STEPS:
        files = [word for word in step.command if word.endswith(".py")]
        assert all((ROOT / file).is_file() for file in files), step.name
    assert set(gpu_check.CASES) == set(CASES) - {"import", "host"}


def test_every_file_with_tests_for_a_gpu_belongs_to_a_step() -> None:
    marked = re.compile(r"^@(pytest\.mark\.gpu|on_a_gpu)$", re.MULTILINE)
    files = {
        str(path.relative_to(ROOT)) for path in (ROOT / "tests").rglob("test_*.py") if marked.search(path.read_text())
    }
    assert files == {word for step in STEPS if "gpu" in step.command for word in step.command if word.endswith(".py")}


def test_the_sanitizers_run_tests_of_every_op() -> None:
    command = gpu_check.sanitizer("memcheck")
    chosen = [sys.executable, *command[command.index("-m") :], "--collect-only"]
    place = chosen.index("-k") + 1
    assert chosen[place].endswith(" and not reference")  # which is what runs here
    chosen[place] = chosen[place].removesuffix(" and not reference")
    done = subprocess.run(chosen, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    names = [line for line in done.stdout.splitlines() if "::" in line]
    for subject in ("shapes_and_strides", "written_into", "equals_sorting", "caps", "hint", "histogram"):
        assert any(subject in name for name in names), subject


def test_steps_that_fail_are_said_and_the_rest_is_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    steps = [FAILING, MISSING, SLOW, SKIPPED, PASSING]
    assert gpu_check.check(steps, tmp_path, {"device": "one | of ours"}) == 1
    record = json.loads((tmp_path / "summary.json").read_text())
    assert [(step["step"], step["verdict"]) for step in record["steps"]] == [
        ("failing", "failed"),
        ("missing", "failed"),
        ("slow", "failed"),
        ("skipped", "skipped"),
        ("passing", "passed"),
    ]
    words = [step["words"] for step in record["steps"]]
    assert words[0] == "exit status 3: a word"
    assert "/nonexistent/program" in words[1]
    assert words[2:] == ["stopped after 2 s: on", "no such tool here", "all is | good"]
    assert (tmp_path / "passing.log").read_text().splitlines()[-1] == "all is | good"
    assert "1 passed, 3 failed, 1 skipped" in (tmp_path / "summary.md").read_text()
    assert str(tmp_path) in capsys.readouterr().out


def test_steps_that_pass_or_cannot_run_are_no_failure(tmp_path: Path) -> None:
    assert gpu_check.check([PASSING, SKIPPED], tmp_path, {}) == 0
    table = [line for line in (tmp_path / "summary.md").read_text().splitlines() if line.startswith("| ")]
    assert [len(re.split(r"(?<!\\)\|", line)) for line in table] == [7] * 3, "a bar in the words ends no cell"


def test_results_folders_are_never_shared(tmp_path: Path) -> None:
    first, second = (gpu_check.results_folder(tmp_path, "NVIDIA H100 80GB/HBM3") for _ in range(2))
    assert re.fullmatch(r"gpu-\d{4}-\d\d-\d\d-NVIDIA-H100-80GB-HBM3", first.name)
    assert second.name == f"{first.name}-2"


def test_what_chooses_the_tests_is_not_inherited(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FEATHER_KERNELS_BACKEND", "FEATHER_PTX_ARCHITECTURE", "TRITON_INTERPRET"):
        monkeypatch.setenv(name, "1")
    given = Step("given", "", (), {"FEATHER_KERNELS_BACKEND": "cuda"})
    variables = gpu_check.environment(given)
    assert {name: value for name, value in variables.items() if name.startswith(("FEATHER_", "TRITON_INT"))} == {
        "FEATHER_KERNELS_BACKEND": "cuda"
    }


def test_bandwidth_of_ours_and_of_the_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, base = tmp_path / "benchmarks.csv", {"size": "full", "case": "threshold", "operation": "p = 3"}
    rows = [
        {**base, "variant": variant, "metric": metric, "value": value}
        for variant, ratio, bandwidth in (("copy_", "1", "3000"), ("ours[cuda]", "1.05", "2857"))
        for metric, value in (("gate", "1"), ("ratio_to_limit", ratio), ("bandwidth", bandwidth))
    ]
    empty = dict.fromkeys(results.COLUMNS, "")
    results.append(path, [{**empty, **row} for row in rows], {})
    assert gpu_check.main(["--bandwidth", str(path)]) == 0
    shown = capsys.readouterr().out
    assert re.search(r"3000 GB/s +1\.00 .*copy_", shown)
    assert re.search(r"2857 GB/s +1\.05 .*ours\[cuda\]", shown)
