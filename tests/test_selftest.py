"""The self-test of an installed package: passes on what is right, and finds what is planted."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from feather_kernels import cli, exact, selftest
from feather_kernels.backends import reference

CPU = torch.device("cpu")


def failed(backend: str = "reference") -> set[tuple[str, str]]:
    return {(check.op, check.dtype) for check in selftest.examine(backend, CPU) if not check.passed}


def test_every_op_and_dtype_passes_and_is_recorded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    assert cli.main(["selftest", "--device", "cpu", "--json", str(file)]) == 0
    record = json.loads(file.read_text())
    assert {(c["op"], c["dtype"]) for c in record["checks"] if c["backend"] == "reference"} == {
        (op, str(dtype).removeprefix("torch.")) for op in selftest.TESTS for dtype in exact.MANTISSA_BITS
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
    monkeypatch.setattr(selftest.dispatch, "availability", lambda device: {"reference": None})
    assert selftest.run(CPU) == 1
    assert "FAILED  count_pruned" in (out := capsys.readouterr().out)
    assert "RuntimeError: illegal address in a kernel" in out


def test_nothing_to_test_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(selftest.dispatch, "availability", lambda device: {"reference": "is missing"})
    assert selftest.run(CPU) == 1


def test_bad_device_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["selftest", "--device", "gpu0"]) == 2
    assert "--device" in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert cli.main(["selftest", "--device", "cuda"]) == 2
        assert "cuda" in capsys.readouterr().err


def test_decimal_oracle_at_hand_computed_points() -> None:
    t, weights = torch.tensor(3.0), torch.tensor([5.0, -5.0, 3.0, -2.0, math.inf, math.nan])
    leading, rest = exact.threshold(weights, t, 2.0)
    assert leading[:5].tolist() == [4.0, -4.0, 0.0, 0.0, math.inf]
    assert leading[5].isnan()
    assert rest.tolist() == [0.0] * 6
    assert exact.ulp_error(torch.tensor([4.0]).nextafter(torch.tensor(9.0)), (leading[:1], rest[:1])) == 1.0
    assert exact.ulp_error(torch.tensor([math.nan]), (leading[:1], rest[:1])) == math.inf
