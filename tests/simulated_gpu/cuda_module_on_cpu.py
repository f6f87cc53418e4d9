"""Puts a build of ``feather_kernels._cuda`` that runs on CPU tensors in the place of the shipped module."""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from types import ModuleType

import pytest
import torch

from feather_kernels.backends import cuda
from feather_kernels.backends.registry import registry


@lru_cache
def load(path: str) -> ModuleType:
    """The module in a file, in a package of its own: pybind11 would return the first one of a name for every file."""
    name = f"module_{hashlib.sha256(path.encode()).hexdigest()}.{cuda.MODULE.rpartition('.')[2]}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def cuda_on_cpu(path: str) -> Iterator[ModuleType]:
    """The CUDA backend takes CPU tensors and the module at ``path`` in place of the shipped one."""
    with pytest.MonkeyPatch.context() as patch, registry.assume_available("cuda", torch.device("cpu")):
        patch.setattr(cuda, "_cuda", load(path))
        yield cuda._cuda
