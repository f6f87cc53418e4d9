"""Options of ``pytest benchmarks --benchmark-only``: --smoke and --device; one test for each variant of each trial."""

from __future__ import annotations

import gc

import pytest
import torch

from benchmarks.case import Setting
from benchmarks.cases import CASES


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options of ``python -m benchmarks run``."""
    parser.addoption("--smoke", action="store_true", help="tiny inputs, one round: shows that everything runs")
    parser.addoption("--device", default="cpu", help="cpu or cuda[:INDEX]")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Parametrize with every trial and variant; nothing is computed for that."""
    if "variant_name" in metafunc.fixturenames:
        config = metafunc.config
        setting = Setting(torch.device(config.getoption("--device")), config.getoption("--smoke"))
        parameters = [
            pytest.param(case.name, trial, name, id=f"{case.name}: {trial.title}: {name}")
            for case in CASES.values()
            for trial in case.trials(setting)
            if trial.rounds
            for name in trial.variants
        ]
        metafunc.parametrize(("case_name", "trial", "variant_name"), parameters)


@pytest.fixture(autouse=True)
def no_garbage() -> None:
    """What the last test has left is collected before the next one."""
    gc.collect()
