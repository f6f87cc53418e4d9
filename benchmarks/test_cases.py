"""The cases for pytest-benchmark: ``pytest benchmarks --benchmark-only``, compared with ``--benchmark-compare``.

Here each variant runs all of its rounds alone. Ratios to report come from ``python -m benchmarks run``, which
interleaves them.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.case import Trial
from benchmarks.clock import clock_for
from benchmarks.measure import Outcome, pass_gate, rounds_for

pytest.importorskip("pytest_benchmark")


class Prepared:
    """The data of one trial at a time: the variants of a trial follow each other."""

    def __init__(self) -> None:
        self.trial: Trial | None = None
        self.data: Any = None

    def of(self, trial: Trial) -> Any:
        """The data of a trial, made when the trial begins."""
        if trial is not self.trial:
            self.data = None  # freed before the next is made
            self.trial, self.data = trial, trial.prepare()
        return self.data


@pytest.fixture(scope="module")
def prepared() -> Prepared:
    """Shared by all tests."""
    return Prepared()


def test_case(
    case_name: str,
    trial: Trial,
    variant_name: str,
    prepared: Prepared,
    benchmark: Any,
    request: pytest.FixtureRequest,
) -> None:
    """Pass the gate, then let pytest-benchmark time the variant."""
    request.addfinalizer(partial(torch.set_grad_enabled, torch.is_grad_enabled()))
    torch.set_grad_enabled(trial.grad)
    outcome = Outcome(variant_name)
    variant = trial.variants[variant_name](prepared.of(trial))
    seconds = pass_gate(variant, clock_for(torch.device(request.config.getoption("--device"))), outcome)
    assert outcome.failure is None, f"not timed: {outcome.failure}"
    benchmark.group = f"{case_name}: {trial.title}"
    benchmark.extra_info.update(moved=outcome.moved, peak_memory=outcome.peak_memory, calls_per_run=variant.calls)

    def setup() -> None:
        variant.before()

    benchmark.pedantic(variant.run, setup=setup, rounds=rounds_for(seconds, trial.rounds, trial.seconds))
