"""Fixtures: the backends under test. A new backend joins every op test by one line in ``BACKENDS``."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import settings

import feather_kernels as fk
from feather_kernels.ops import dispatch

torch.set_num_threads(1)  # small tensors: more threads only fight each other
settings.register_profile("ci", deadline=None, derandomize=True, max_examples=60)
settings.load_profile("ci")


@dataclass(frozen=True)
class BackendUnderTest:
    name: str
    device: torch.device

    def __str__(self) -> str:
        return f"{self.name}-{self.device}"


BACKENDS = [BackendUnderTest("reference", torch.device("cpu"))]


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[BackendUnderTest]:
    chosen: BackendUnderTest = request.param
    reason = dispatch.availability(chosen.device).get(chosen.name)
    if reason is not None:
        pytest.skip(f"{chosen}: {reason}")
    with fk.use_backend(chosen.name):
        yield chosen
