"""Tests of the mutation test's own code. `make mutants` runs the mutation test itself."""

from __future__ import annotations

import csv
import importlib.util
import os

import pytest
import torch

from tests.mutation import cases, runner, sources
from tests.mutation.runner import Result, Survivor

compiles = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None or os.environ.get("TRITON_INTERPRET") == "1",
    reason="needs Triton's compiler",
)
KILLED = Result("triton", "count_kernel", "add.s32 a, b, 1", "add.s32 a, b, 2", "count float32", "AssertionError")
SURVIVOR = KILLED._replace(killed_by="", how="")
EXPLAINED = [Survivor(*SURVIVOR[:4], reason="nobody reads it")]


@pytest.mark.parametrize(
    ("results", "known", "good"),
    [
        ([KILLED] * 9, [], True),
        ([KILLED] * 9 + [SURVIVOR], EXPLAINED, True),
        ([KILLED] * 9 + [SURVIVOR], [], False),
        ([KILLED] * 9 + [SURVIVOR], [EXPLAINED[0]._replace(kind="cuda")], False),
        ([KILLED] * 9 + [SURVIVOR], [EXPLAINED[0]._replace(reason="")], False),
        ([KILLED] * 8 + [SURVIVOR], EXPLAINED, False),
    ],
    ids=["all killed", "one explained", "one not explained", "another kind", "no reason", "too few"],
)
def test_what_is_good_enough(results: list[Result], known: list[Survivor], good: bool) -> None:
    lines, enough = runner.summary(results, known)
    assert enough == good
    killed = results.count(KILLED)
    assert lines[0].startswith(f"triton: {killed} of {len(results)} mutants killed")
    assert any("not explained in" in line for line in lines) == (SURVIVOR in results and known != EXPLAINED)


def test_a_survivor_is_printed_as_the_row_that_it_needs() -> None:
    (printed,) = csv.reader([runner.row(SURVIVOR)])
    assert printed == ["triton", "count_kernel", "add.s32 a, b, 1", "add.s32 a, b, 2", ""]


def test_every_known_survivor_has_a_reason_and_names_a_mutant() -> None:
    known = runner.known_survivors()
    assert len({survivor[:4] for survivor in known}) == len(known)
    listed = {"sources-cpu": sources.CPU, "sources-cuda": sources.CUDA}
    for survivor in known:
        assert survivor.reason.endswith("."), survivor
        assert survivor.kind in runner.KINDS, survivor
        if survivor.kind in listed:
            changes = {runner.described(change) for change in listed[survivor.kind]}
            assert (survivor.kernel, survivor.before, survivor.after) in changes, survivor
        else:
            assert survivor.kernel.endswith("_kernel"), survivor


@compiles
@pytest.mark.parametrize("weak", [False, True], ids=["a check", "a check that sees nothing"])
def test_mutants_of_a_compiled_kernel_run(monkeypatch: pytest.MonkeyPatch, weak: bool) -> None:
    def check(launches: list) -> None:
        counts = torch.ops.feather_kernels.count_pruned([torch.ones(40), torch.zeros(9)], [torch.tensor(0.5)] * 2)
        assert weak or counts.tolist() == [0, 9]

    monkeypatch.setattr(runner, "CASES", [cases.Case("two counts", check)])
    results = list(runner.ptx_results("triton", 12, "count"))
    assert len(results) == 12
    assert {result.kernel for result in results} == {"count_kernel"}
    wrong_values = [result for result in results if result.how == "AssertionError"]
    assert bool(wrong_values) != weak
    assert all(result.killed_by == "two counts" for result in wrong_values)


@compiles
def test_a_case_that_fails_without_a_mutant_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(launches: list) -> None:
        assert torch.ops.feather_kernels.count_pruned([torch.zeros(9)], [torch.tensor(0.5)]).tolist() == [8]

    monkeypatch.setattr(runner, "CASES", [cases.Case("wrong", check)])
    with pytest.raises(AssertionError, match="wrong fails on unchanged kernels"):
        list(runner.ptx_results("triton", 1, ""))


@pytest.mark.parametrize("change", dict.fromkeys([*sources.CPU, *sources.CUDA]), ids=str)
def test_every_change_of_a_source_still_applies(change: sources.Change) -> None:
    assert (sources.ROOT / "csrc" / change.path).read_text().count(change.old) == 1
    assert change.old != change.new
