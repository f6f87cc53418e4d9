"""Fixtures: the backends under test. A new backend joins every op test by one line in ``BACKENDS``."""

from __future__ import annotations

import os
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
    """A backend on a device. Triton's interpreter truncates bfloat16 where it should round, and loses its denormals."""

    name: str
    device: torch.device
    exact_bfloat16: bool = True

    def skip_inexact(self, *dtypes: torch.dtype) -> None:
        """Skip the test where one of the dtypes is not to be relied on."""
        if torch.bfloat16 in dtypes and not self.exact_bfloat16:
            pytest.skip("Triton's interpreter truncates bfloat16")

    def __str__(self) -> str:
        return f"{self.name}-{self.device}"


CPU = torch.device("cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # ring 1 is a process of its own: triton reads it at import
BACKENDS = [
    BackendUnderTest("triton", CPU, exact_bfloat16=False) if INTERPRETED else BackendUnderTest("reference", CPU)
]


@pytest.fixture(params=BACKENDS, ids=str)
def backend(request: pytest.FixtureRequest) -> Iterator[BackendUnderTest]:
    chosen: BackendUnderTest = request.param
    with fk.use_backend(chosen.name):
        dispatch.backend_for(chosen.device)
        yield chosen
