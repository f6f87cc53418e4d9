"""Fixtures of the tests of the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch


@pytest.fixture(autouse=True, scope="module")
def process_settings() -> Iterator[None]:
    """The command sets threads and cuDNN of its process, which here is that of all tests."""
    threads, deterministic = torch.get_num_threads(), torch.backends.cudnn.deterministic
    yield
    torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = deterministic


@pytest.fixture(scope="module")
def short_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run of 3 epochs on the digits; tests leave it as it is."""
    from tests.support.train_runs import train

    runs = tmp_path_factory.mktemp("runs")
    assert train(runs, "--name", "short") == 0
    return runs / "short"
