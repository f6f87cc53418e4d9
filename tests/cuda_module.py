"""Builds of ``feather_kernels._cuda`` that run its kernels on CPU tensors: rings 4 and 5."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType

import pytest
import torch

from feather_kernels.backends import cuda
from feather_kernels.ops import dispatch


@lru_cache
def load(path: str) -> ModuleType:
    """The module in a file."""
    spec = importlib.util.spec_from_file_location(cuda.MODULE, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def cuda_on_cpu(path: str) -> Iterator[ModuleType]:
    """The CUDA backend takes CPU tensors and the module at ``path`` in place of the shipped one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_cuda", load(path))
        patch.setitem(dispatch._probed, ("cuda", torch.device("cpu")), None)
        yield cuda._cuda
