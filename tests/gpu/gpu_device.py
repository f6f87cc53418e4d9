"""The mark, the device and the backends that tests on a real GPU share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import feather_kernels as fk
from feather_kernels.backends.registry import registry
from tests.conftest import BackendUnderTest

GPU = torch.device("cuda", 0)
NAMES = ("triton", "cuda")  # backends with kernels for it


def on_a_gpu(test: Callable[..., Any]) -> Callable[..., Any]:
    """Mark a test ``gpu``, and skip it where there is none."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


@contextmanager
def gpu_backend(name: str, device: torch.device = GPU) -> Iterator[BackendUnderTest]:
    """The named backend for all ops on a GPU; skips the test, with the reason, where it cannot run."""
    reason = registry.availability(device)[name]
    if reason is not None:
        pytest.skip(f"{name}: {reason}")
    with fk.use_backend(name):
        yield BackendUnderTest(name, device)
