"""``feather-kernels gpu-report``: its files, its bad endings, and all its parts on the executor of PTX."""

from __future__ import annotations

import getpass
import importlib.util
import json
import platform
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from feather_kernels import cli
from feather_kernels.backends.registry import registry
from feather_kernels.cli import doctor
from feather_kernels.cli.gpu_report import clock, machine, page, report, run_part, speed
from feather_kernels.cli.gpu_report.layers import make_layers
from feather_kernels.cli.gpu_report.parts import PARTS
from feather_kernels.cli.gpu_report.target import Target
from feather_kernels.cli.gpu_report.training import difference
from feather_kernels.dtypes import WEIGHT_DTYPES
from tools import gpu_report_on_executor

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "docs" / "gpu-results"
FILES = ["gpu-report-ptx-sm_90.json", "gpu-report-ptx-sm_90.md"]
CPU = torch.device("cpu")

CHILD = """
import json, os, signal, subprocess, sys, time
name, rows = sys.argv[1:3]
check = {"backend": "cuda", "op": "threshold", "unit": "ulp", "bound": 2.0}
with open(rows, "w") as file:
    if name == "machine":
        print(json.dumps({"facts": {"gpu": "NVIDIA Test/1 80GB"}}), file=file)
    if name == "selftest-cuda":
        print(json.dumps({**check, "dtype": "float16", "error": 0.5, "wrong": None}), file=file)
        print(json.dumps({**check, "dtype": "float32", "error": None, "wrong": "in /home/somebody/secret"}), file=file)
        print('{"cut off', file=file)
if name == "doctor":
    print("first"); print("in /home/somebody/lib/broken.py: no luck", flush=True); sys.exit(3)
if name == "speed-triton":
    row = {"backend": "triton", "op": "threshold", "what": "p = 3", "elements": 8, "moved": 64, "wrong": "3 values"}
    with open(rows, "w") as file:
        print(json.dumps(row), file=file, flush=True)
    os.kill(os.getpid(), signal.SIGSEGV)
if name == "host-eager":
    with open(os.environ["GRANDCHILD"], "w") as file:
        print(subprocess.Popen(["sleep", "600"]).pid, file=file)
    time.sleep(600)
"""
TRIED = ("machine", "doctor", "selftest-cuda", "speed-triton", "host-eager", "training")


def request(folder: Path, **options: Any) -> report.Request:
    script = folder / "child.py"
    script.write_text(CHILD)
    return report.Request(folder / "out", child=(sys.executable, str(script)), patience=0.05, parts=TRIED, **options)


def record_in(folder: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    (file,) = folder.glob("*.json")

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    record = json.loads(file.read_text(), parse_constant=refuse)
    return record, {entry["part"]: entry for entry in record["parts"]}


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_parts_that_crash_or_hang_are_said_and_stop_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRANDCHILD", str(tmp_path / "grandchild"))
    assert report.make(request(tmp_path)) == 1
    record, parts = record_in(tmp_path / "out")
    assert {name: entry["verdict"] for name, entry in parts.items()} == {
        **dict.fromkeys(TRIED, "failed"),
        "machine": "passed",
        "training": "passed",
    }
    assert parts["doctor"]["words"] == "exit status 3; last words: in .../broken.py: no luck"
    assert parts["selftest-cuda"]["words"] == "1 of 2 results wrong", "the line that was cut off is no result"
    assert parts["selftest-cuda"]["rows"][1]["wrong"] == "in ..."
    assert parts["speed-triton"]["words"].startswith("ended by SIGSEGV")
    assert [row["what"] for row in parts["speed-triton"]["rows"]] == ["p = 3"], "what was found before the crash stays"
    assert parts["host-eager"]["words"].startswith("stopped after 3 s")
    end = time.monotonic() + 10
    while alive(int((tmp_path / "grandchild").read_text())):
        assert time.monotonic() < end, "a process that a part had started still runs"
    assert record["machine"] == {"gpu": "NVIDIA Test/1 80GB"}
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "gpu-report-NVIDIA-Test-1-80GB.json",
        "gpu-report-NVIDIA-Test-1-80GB.md",
    ]


def test_files_that_are_there_are_kept_without_force(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    there = tmp_path / "out" / "gpu-report-NVIDIA-Test-1-80GB.md"
    there.write_text("precious")
    with pytest.raises(ValueError, match=r"gpu-report-NVIDIA-Test-1-80GB\.md exists: give --force"):
        report.make(request(tmp_path))
    assert there.read_text() == "precious"
    assert "doctor" not in capsys.readouterr().out, "nothing long ran before that was said"
    with pytest.raises(ValueError, match="exists: give --force"):
        report.make(request(tmp_path, name="NVIDIA Test 1 80GB"))


def test_force_overwrites_and_what_the_total_leaves_no_time_for_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "TOTAL", 0)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "gpu-report-mine.json").write_text("precious")
    assert report.make(request(tmp_path, name="mine", force=True)) == 0
    _, parts = record_in(tmp_path / "out")
    assert {(entry["verdict"], entry["words"]) for entry in parts.values()} == {("skipped", "no time was left")}


def test_the_limits_leave_time_in_five_minutes() -> None:
    assert report.TOTAL < 300
    assert all(entry.limit < report.TOTAL for entry in PARTS.values())


@pytest.mark.parametrize("folder", ["file", "file/below"])
def test_a_folder_that_cannot_be_written_is_one_line(
    folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(machine, "no_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert cli.main(["gpu-report", "--output", str(tmp_path / folder)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert f"--output must be a folder that can be written, got {tmp_path / folder}: " in output.err


@pytest.mark.parametrize(("given", "count"), [("gpu0", 1), ("cpu", 1), ("cuda:", 1), ("cuda:x", 1), ("cuda:2", 2)])
def test_an_unknown_device_is_one_line(
    given: str, count: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "no_device", lambda: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    assert cli.main(["gpu-report", "--device", given]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--device must be" in error
    assert given in error


def test_without_a_gpu_it_ends_with_a_line_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["gpu-report", "--output", str(tmp_path / "out")]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert "gpu-report needs an NVIDIA GPU" in output.err
    assert not (tmp_path / "out").exists()


def test_folders_users_and_hosts_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine.platform, "node", lambda: "ship7.example.org")
    monkeypatch.setattr(machine.getpass, "getuser", lambda: "ahab")
    monkeypatch.setattr(Path, "home", lambda: Path("/home/Captain Ahab"))
    texts = {
        "File /home/x/lib/python3.12/site-packages/torch/cuda.py, line 7": "File .../cuda.py, line 7",
        "no such file: '/home/Captain Ahab/white whale/log'": "no such file: '...'",
        "Command '['gcc', '-I/mnt/acme/inc', '-L/mnt/acme/lib']'": "Command '['gcc', '-I...', '-L...']'",
        "see file:///mnt/acme/x": "see file://...",
        "'/mnt/My Project Acme/x.py' failed": "'...' failed",
        "ahab at ship7 and ship7.example.org": "... at ... and ...",
        "at /usr/lib64/libcuda.so (32/64 bits, 75%/50%)": "at .../libcuda.so (32/64 bits, 75%/50%)",
        "https://docs.example.org/a/b": "https://docs.example.org/a/b",
        "torch 2.9.1+cu130, sm_90/sm_100": "torch 2.9.1+cu130, sm_90/sm_100",
    }
    assert {text: machine.anonymous(text) for text in texts} == texts


def personal() -> list[str]:
    names = [platform.node(), getpass.getuser(), str(Path.home()), str(ROOT), tempfile.gettempdir(), sys.prefix]
    return [name for name in names if len(name) > 2]


def check_computed(folder: Path, parts: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    record, found = record_in(folder)
    assert {name: (entry["verdict"], entry["words"]) for name, entry in found.items() if name in parts} == {
        name: ("passed", found[name]["words"]) for name in parts
    }
    assert record["kind"] == page.COMPUTED
    for file in folder.iterdir():
        text = file.read_text()
        assert "seconds" not in text, "an executor knows no speed"
        assert [name for name in personal() if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text)] == []
    return found


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_all_parts_run_on_the_executor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FEATHER_KERNELS_BACKEND", "reference")  # must not reach the parts
    parts = tuple(name for name in PARTS if not name.endswith("-cuda"))
    assert gpu_report_on_executor.make(tmp_path, parts) == 0
    found = check_computed(tmp_path, parts)
    assert "FEATHER_KERNELS_BACKEND is not set" in found["doctor"]["rows"][0]["text"]
    assert found["doctor"]["rows"][0]["text"] == machine.anonymous(doctor_text(monkeypatch))
    checked = {(row["op"], row["dtype"]) for row in found["selftest-triton"]["rows"]}
    assert len(checked) == 6 * len(WEIGHT_DTYPES)
    for row in found["speed-triton"]["rows"]:
        figures = {name: spread["median"] for name, spread in row["ours"].items()}
        if row["op"] in ("threshold", "scale_pruned_grad"):
            assert figures[page.LAUNCHES] == 1
            moved = figures[page.READ] + figures[page.WRITTEN]
            assert row["moved"] <= moved <= 1.01 * row["moved"] + 64, row["what"]
        assert figures[page.INSTRUCTIONS] > row["elements"]
        assert row["copy"][page.LAUNCHES]["median"] == 0
    layers = {(row["what"], row["variant"]): row["figures"][page.LAUNCHES]["median"] for row in rows_of(found, "host")}
    for way, launches in (("eager", [0, 1, 2]), ("compiled", [0, 1, 1])):
        assert [layers[f"layer, {way}", name] for name in ("dense", "grad_scale 1", "grad_scale 0.5")] == launches
    assert layers["step of 2 layers", "SGD.step"] == 0
    assert layers["step of 2 layers", "Sparsifier.step"] > 5
    assert len(found["training"]["rows"]) == 2 * 3


def doctor_text(monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.delenv("FEATHER_KERNELS_BACKEND")
    registry.reset()
    return doctor.examine()


def rows_of(found: dict[str, dict[str, Any]], subject: str) -> list[dict[str, Any]]:
    return [row for name, entry in found.items() if name.startswith(subject) for row in entry["rows"]]


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_parts_of_the_cuda_backend_run_on_the_executor(tmp_path: Path) -> None:
    parts = tuple(name for name in PARTS if name.endswith("-cuda"))
    assert gpu_report_on_executor.make(tmp_path, parts) == 0
    found = check_computed(tmp_path, parts)
    assert {row["ours"][page.LAUNCHES]["median"] for row in found["speed-cuda"]["rows"][:9]} == {1}


def test_a_backend_that_cannot_run_is_skipped_with_its_reason(tmp_path: Path) -> None:
    here = on_cpu()
    assert run_part.main(["selftest-cuda", str(tmp_path / "rows")], lambda device, quick: here) == 0
    (row,) = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert "backend 'cuda' cannot run on cpu" in row[run_part.SKIPPED]


def on_cpu() -> Target:
    def meter(run: Any) -> dict[str, float]:
        run()
        return {"seconds": 1.0}

    return Target(CPU, dict, lambda: meter, lambda: meter, "reference", 1 << 12, 2, 2, False, "eager")


def test_an_op_with_a_wrong_result_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    right = speed.difference
    monkeypatch.setattr(speed, "difference", lambda a, b, relative: right((a * 1.01).to(a.dtype), b, relative))
    found = list(speed.rows(on_cpu(), "reference"))
    assert len(found) == 13
    off = [row for row in found if row["op"] == "threshold"]
    assert all(re.match(r"\d+ of 4096 values differ", str(row["wrong"])) and "ours" not in row for row in off)


def test_differences_are_told_from_roundings() -> None:
    wanted = torch.tensor([1.0, 0.0, -2.0])
    assert speed.difference(wanted.clone(), wanted, 0.0) is None
    assert speed.difference(wanted * (1 + 2**-22), wanted, 4 * torch.finfo(torch.float32).eps) is None
    assert speed.difference(wanted * (1 + 2**-22), wanted, 0.0) is not None
    assert speed.difference(wanted * (1 + 2**-20), wanted, 4 * torch.finfo(torch.float32).eps) is not None
    assert speed.difference(wanted + torch.tensor([0.0, 1e-30, 0.0]), wanted, 1e-6) is not None
    assert speed.difference(torch.tensor([3, 4]), torch.tensor([3, 5]), 0.0) is not None


def test_a_layer_with_wrong_gradients_is_said() -> None:
    layers = make_layers(2, CPU, 0.5, None)
    parameters = list(layers.model.parameters())
    assert difference(layers.both, parameters) is None
    calls = iter(range(2))

    def off() -> torch.Tensor:
        y = layers.both()
        assert parameters[1].grad is not None
        parameters[1].grad.mul_(1.01 if next(calls) == 0 else 1.0)
        return y

    assert re.match(r"gradient 1, of norm .* off the reference backend's", str(difference(off, parameters)))


def test_medians_of_interleaved_rounds() -> None:
    order: list[str] = []
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    clock.interleaved(runs, {"a": 5, "b": 5}, 5)
    assert all(set(order[index : index + 2]) == {"a", "b"} for index in range(0, 10, 2))
    found = clock.spread([{"seconds": value} for value in (5.0, 1.0, 2.0, 9.0, 3.0, 4.0)], divisor=2)
    assert found == {"seconds": {"median": 1.5, "p20": 1.0, "p80": 2.5}}


def measured_record() -> dict[str, Any]:
    def at(median: float) -> dict[str, dict[str, float]]:
        return {"seconds": {"median": median, "p20": 0.9 * median, "p80": 1.1 * median}}

    ops = {"backend": "cuda", "op": "threshold", "what": "float32, p = 3", "elements": 1 << 25, "moved": 1 << 28}
    check = {"backend": "cuda", "op": "threshold", "dtype": "float32", "error": 1.32, "bound": 2.0, "unit": "ulp"}
    steps = [("dense", 10e-3), ("grad_scale 1", 11e-3)]
    rows = {
        "machine": [],
        "selftest-cuda": [{**check, "wrong": None}, {**check, "dtype": "float16", "error": None, "wrong": "a | b"}],
        "speed-cuda": [{**ops, "wrong": None, "ours": at(110e-6), "copy": at(100e-6)}, {**ops, "wrong": "3 values"}],
        "training": [{"what": "net", "variant": name, "figures": at(s), "wrong": None} for name, s in steps],
    }
    parts = [{"part": name, "verdict": "passed", "words": "", "rows": found} for name, found in rows.items()]
    facts = {"gpu": "NVIDIA H100", "driver": "580"}
    return {"format": 1, "kind": "measured", "quick": False, "date": "2026-01-01", "machine": facts, "parts": parts}


def test_measured_figures_on_the_page(tmp_path: Path) -> None:
    text = page.report(measured_record())
    assert "- gpu: NVIDIA H100" in text
    assert "| cuda | threshold | 1.32 of 2 ulp | WRONG: a \\| b |" in text
    time_and_copy = "110.0 µs (99.0 to 121.0) | 100.0 µs (90.0 to 110.0)"
    assert f"| cuda | threshold | float32, p = 3 | {time_and_copy} | 1.10 | 2440 |" in text
    assert "WRONG: 3 values" in text
    assert "| net | grad_scale 1 | 11000.0 µs (9900.0 to 12100.0) | +1000.0 µs, 1.10x |" in text
    assert page.COMPUTED_NOTE not in text
    for name in ("b", "a"):
        (tmp_path / f"gpu-report-{name}.json").write_text(json.dumps(measured_record()))
    table = page.table([tmp_path / "gpu-report-b.json", tmp_path / "gpu-report-a.json"])
    assert table.index("\n## a\n") < table.index("\n## b\n")
    assert "| a | measured | NVIDIA H100 | unknown | unknown | 580 |" in table


@pytest.mark.parametrize("text", ["", "[1]", '{"format": 0}', "{"])
def test_a_file_that_is_no_report_is_one_line(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text(text)
    assert cli.main(["gpu-report", "--table", str(tmp_path / "x.json")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--table must be files that gpu-report wrote" in error


def test_the_page_of_results_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    line = r"feather-kernels (gpu-report --table) docs/gpu-results/\*\.json > docs/gpu-results/README\.md"
    (command,) = re.findall(line, page.INTRODUCTION)
    assert cli.main([*command.split(), *map(str, RESULTS.glob("*.json"))]) == 0
    assert (RESULTS / "README.md").read_text() == capsys.readouterr().out


def test_the_computed_report_among_the_results_is_whole() -> None:
    record = page.load(RESULTS / FILES[0])
    assert record["kind"] == page.COMPUTED
    assert [entry["part"] for entry in record["parts"]] == list(PARTS)
    assert {entry["verdict"] for entry in record["parts"]} == {"passed"}
    assert (RESULTS / FILES[1]).read_text() == page.report(record)
    assert page.COMPUTED_NOTE in (RESULTS / "README.md").read_text()


def test_the_issue_form_asks_for_both_files() -> None:
    yaml = pytest.importorskip("yaml")
    form = yaml.safe_load((ROOT / ".github" / "ISSUE_TEMPLATE" / "gpu-report.yml").read_text())
    assert f'issue form "{form["name"]}"' in page.INTRODUCTION
    required = {field.get("id"): field.get("validations", {}).get("required", False) for field in form["body"]}
    assert required["markdown"]
    assert required["json"]
    assert "feather-kernels gpu-report" in form["body"][0]["attributes"]["value"]
