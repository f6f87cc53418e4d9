"""The self-test of an installed package: passes on what is right, and finds what is planted."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
import torch

from feather_kernels import cli
from feather_kernels.backends import reference
from feather_kernels.cli.selftest import checks, command, oracle
from feather_kernels.dtypes import WEIGHT_DTYPES

CPU = torch.device("cpu")


def failed(backend: str = "reference") -> set[tuple[str, str]]:
    return {(check.op, check.dtype) for check in checks.examine(backend, CPU) if not check.passed}


def test_every_op_and_dtype_passes_and_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    assert cli.main(["selftest", "--device", "cpu", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert {(c["op"], c["dtype"]) for c in record["checks"] if c["backend"] == "reference"} == {
        (op, str(dtype).removeprefix("torch.")) for op in checks.TESTS for dtype in WEIGHT_DTYPES
    }
    assert all(check["passed"] and check["values"] > 0 for check in record["checks"])
    assert record["device"] == "cpu"
    assert f"{len(record['checks'])} passed, 0 failed" in capsys.readouterr().out


def test_a_predicate_that_keeps_ties_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "_pruned", lambda w, t: (t > 0) & (w.abs() < t))
    found = failed()
    assert {("threshold", "float32"), ("count_pruned", "float64"), ("scale_pruned_grad", "float32")} <= found


def test_values_three_ulp_off_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference._threshold

    def off(weight: torch.Tensor, t: torch.Tensor, p: float) -> torch.Tensor:
        return right(weight, t, p) * (1 + 3 * torch.finfo(t.dtype).eps)

    monkeypatch.setattr(reference, "_threshold", off)
    assert ("threshold", "float32") in failed()


def test_whole_blocks_that_are_wrong_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.threshold

    def off(w: torch.Tensor, t: torch.Tensor, p: float, out: torch.Tensor) -> None:
        right(w, t, p, out)
        whole = out.view(-1)[: out.numel() // 1024 * 1024]
        whole.mul_(1.5)

    monkeypatch.setattr(reference, "threshold", off)
    assert {op for op, _ in failed()} >= {"threshold", "training step"}


def test_a_rank_that_is_one_off_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    right = reference.magnitude_select

    def off(weights: Any, groups: Any, rank: torch.Tensor, *rest: Any) -> None:
        right(weights, groups, rank + 1, *rest)

    monkeypatch.setattr(reference, "magnitude_select", off)
    assert {op for op, _ in failed()} >= {"magnitude_select", "training step"}


def test_an_error_is_a_failure_with_its_words(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError("illegal address\nin a kernel")

    monkeypatch.setattr(reference, "count_pruned", broken)
    monkeypatch.setattr(command.registry, "availability", lambda device: {"reference": None})
    assert command.check_device(CPU) == 1
    assert "FAILED  count_pruned" in (out := capsys.readouterr().out)
    assert "RuntimeError: illegal address in a kernel" in out


def test_an_error_that_is_no_number_is_null_in_json(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(w: torch.Tensor, t: torch.Tensor, p: float, out: torch.Tensor) -> None:
        out.fill_(math.nan)

    monkeypatch.setattr(reference, "threshold", wrong)
    monkeypatch.setattr(command.registry, "availability", lambda device: {"reference": None})
    assert command.check_device(CPU, tmp_path / "result.json") == 1

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    records = json.loads((tmp_path / "result.json").read_text(), parse_constant=refuse)["checks"]
    assert {check["error"] for check in records if check["op"] == "threshold"} == {None}


def cases(path: Path, backend: str) -> dict[str, ElementTree.Element]:
    found = ElementTree.parse(path).getroot().findall(f"testsuite[@name='selftest.{backend}']/testcase")
    assert {case.get("classname") for case in found} == {f"feather_kernels.selftest.{backend}"}
    return {case.get("name", ""): case for case in found}


NAMES = {
    f"{op}[{dtype}]"
    for op in (
        *("threshold", "scale_pruned_grad", "count_pruned", "magnitude_select", "magnitude_histogram"),
        "training_step",
    )
    for dtype in ("float16", "bfloat16", "float32", "float64")
}


def test_junit_has_a_case_for_each_backend_op_and_dtype(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.xml"
    assert cli.main(["selftest", "--device", "cpu", "--junit", str(file)]) == 0
    found = cases(file, "reference")
    assert set(found) == NAMES
    assert all(len(case) == 0 for case in found.values()), "no failure, no error, nothing skipped"
    assert 0 < float(found["threshold[float32]"].get("time", "0")) < 60
    suite = ElementTree.parse(file).getroot().find("testsuite[@name='selftest.reference']")
    assert suite is not None
    assert [suite.get(key) for key in ("tests", "failures", "errors", "skipped")] == ["24", "0", "0", "0"]


def test_an_outcome_says_what_was_found_and_what_is_allowed() -> None:
    differ = checks.Check("reference", "count_pruned", "float32", 2552, 3, 0, "values differ")
    assert differ.outcome == "3 of 2552 values differ, 0 allowed"
    ulp = checks.Check("reference", "threshold", "float32", 2552, 0.5, 2, "ulp")
    assert ulp.outcome == "error 0.5 ulp in 2552 values, 2 allowed"


def test_junit_says_what_failed_and_why_a_backend_did_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> None:
        raise RuntimeError('<illegal> & \x1b[31mred\x00 "quoted"')

    monkeypatch.setattr(reference, "count_pruned", broken)
    monkeypatch.setattr(reference, "_pruned", lambda w, t: (t > 0) & (w.abs() < t))
    offered = {"triton": "is not installed: No module named 'triton'", "reference": None}
    monkeypatch.setattr(command.registry, "availability", lambda device: offered)
    assert command.check_device(CPU, junit_file=tmp_path / "result.xml") == 1
    found = cases(tmp_path / "result.xml", "reference")
    assert set(found) == NAMES
    raised, wrong = found["count_pruned[float16]"].find("failure"), found["threshold[float32]"].find("failure")
    assert raised is not None
    assert raised.get("message") == 'RuntimeError: <illegal> & \ufffd[31mred\ufffd "quoted"'
    assert wrong is not None
    assert wrong.get("message", "").endswith("ulp in 76545 values, 2 allowed")
    skipped = cases(tmp_path / "result.xml", "triton")
    assert set(skipped) == NAMES, "the names do not depend on the machine"
    assert Counter(case[0].get("message") for case in skipped.values()) == {offered["triton"]: 24}
    assert all(case[0].tag == "skipped" for case in skipped.values())


def test_a_required_backend_that_cannot_run_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.xml"
    arguments = ["selftest", "--device", "cpu", "--junit", str(file), "--require"]
    assert cli.main([*arguments, "reference"]) == 0
    capsys.readouterr()
    assert cli.main([*arguments, "reference", "triton"]) == 1
    output = capsys.readouterr().out
    assert "triton on cpu: is not for cpu devices" in output
    assert output.splitlines()[-1] == "FAILED: triton is required and cannot run"
    assert {case[0].tag for case in cases(file, "triton").values()} == {"error"}
    assert cli.main([*arguments, "abacus"]) == 2
    assert "--require must be one of triton, cuda, cpp, reference, got 'abacus'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--json", "--junit"])
def test_a_file_that_cannot_be_written_is_one_line_before_anything_runs(
    option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    missing = tmp_path / "missing" / "result"
    assert cli.main(["selftest", "--device", "cpu", option, str(missing)]) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert f"{option} must be a file that can be written, got '{missing}': No such file or directory" in output.err


def test_nothing_to_test_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.registry, "availability", lambda device: {"reference": "is missing"})
    assert command.check_device(CPU) == 1


def test_bad_device_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["selftest", "--device", "gpu0"]) == 2
    assert "--device" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main(["selftest", "--device", "cuda"]) == 2
        assert "cuda" in capsys.readouterr().err


def test_decimal_oracle_at_hand_computed_points() -> None:
    t, weights = torch.tensor(3.0), torch.tensor([5.0, -5.0, 3.0, -2.0, math.inf, math.nan])
    leading, rest = oracle.threshold(weights, t, 2.0)
    assert leading[:5].tolist() == [4.0, -4.0, 0.0, 0.0, math.inf]
    assert leading[5].isnan()
    assert rest.tolist() == [0.0] * 6
    assert oracle.ulp_error(torch.tensor([4.0]).nextafter(torch.tensor(9.0)), (leading[:1], rest[:1])) == 1.0
    assert oracle.ulp_error(torch.tensor([math.nan]), (leading[:1], rest[:1])) == math.inf
