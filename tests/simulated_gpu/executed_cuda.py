"""Runs the shipped objects of csrc/cuda on CPU tensors and executes every launch as PTX.

    with executed(90) as gpu, fk.use_backend("cuda"):
        torch.ops.feather_kernels.threshold(w, t, 3.0)
    assert gpu.launches[-1].bytes_read == ...

A call takes its usual way through the registry, the Python launcher and the module's C++. The module is linked against
a stand-in for the CUDA runtime (csrc/tests/cuda/cudart.cpp), which hands each launch, with its argument bytes, to
tools/ptx_executor.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from feather_kernels.backends import cuda
from feather_kernels.backends.gpu.chunk_tables import ChunkTable
from feather_kernels.backends.registry import registry
from tests.simulated_gpu import shipped_build
from tests.simulated_gpu.cuda_module_on_cpu import load
from tools.ptx_executor.execution import LaunchReport, Options, Program
from tools.ptx_executor.memory import extent

STREAM = 0x7FA5_1234_89AB_CDE0  # of every call: wider than 32 bits, so that one passed as less is seen
LAUNCH_FAILURE = 719
LAUNCHER = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.POINTER(ctypes.c_uint), ctypes.c_size_t,
    ctypes.c_void_p, ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip


@contextmanager
def executed(architecture: int, module: Path | None = None, ptx: Sequence[Path] | None = None) -> Iterator[Executor]:
    """The CUDA backend takes CPU tensors: the PTX of ``architecture`` runs on them, with all of the executor's checks.

    Args:
        architecture: e.g. 90.
        module: linked against the stand-in; the shipped objects where it is left out.
        ptx: the PTX of its kernels; that of the sources where it is left out.

    A fault that the executor finds is raised from the op, in place of the RuntimeError of a failed launch.
    """
    path = shipped_build.relinked() if module is None else module
    executor = Executor(load(str(path)), shipped_build.ptx(architecture) if ptx is None else ptx)
    set_launcher = ctypes.CDLL(str(path)).feather_set_launcher
    address, addresses = cuda._address, cuda._addresses

    def address_of(tensor: torch.Tensor | None) -> int:
        if tensor is not None:
            executor.extents.append(extent(tensor))
        return address(tensor)

    def addresses_of(tables: Sequence[ChunkTable]) -> Any:
        executor.extents.extend(extent(tensor) for table in tables for tensor in table.kept)
        return addresses(tables)

    with pytest.MonkeyPatch.context() as patch, registry.assume_available("cuda", torch.device("cpu")):
        patch.setattr(cuda, "_cuda", executor)
        patch.setattr(cuda, "_address", address_of)
        patch.setattr(cuda, "_addresses", addresses_of)
        patch.setattr(cuda, "_stream", lambda device: STREAM)
        set_launcher(executor.launcher)
        try:
            yield executor
        finally:
            set_launcher(None)


class Executor:
    """Stands in the place of ``feather_kernels._cuda``; ``launches`` has a report for every launch.

    A launch may touch what the tensors of this very call occupy, ``extents``, and nothing else.
    """

    def __init__(self, module: ModuleType, ptx: Sequence[Path]) -> None:
        self.module = module
        self.entries = {name: text for path in ptx for name, text in entries(path).items()}
        self.launches: list[LaunchReport] = []
        self.extents: list[tuple[int, int]] = []
        self.fault: BaseException | None = None
        self.launcher = LAUNCHER(self._launch)  # kept, as C++ holds its address only

    def __getattr__(self, name: str) -> Any:
        value = getattr(self.module, name)
        return partial(self._call, value) if callable(value) else value

    def _call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        self.fault = None
        try:
            return function(*arguments)
        except RuntimeError as error:
            if self.fault is not None:
                raise self.fault from error
            raise
        finally:
            self.extents.clear()

    def _launch(self, name: bytes, grid: Any, block: Any, shared: int, stream: int | None, arguments: Any) -> int:
        try:
            self._execute(name.decode(), grid[:3], block[:3], shared, stream, arguments)
        except BaseException as error:  # a function that C++ calls cannot raise
            self.fault = error
            return LAUNCH_FAILURE
        return 0

    def _execute(
        self, name: str, grid: list[int], block: list[int], shared: int, stream: int | None, arguments: Any
    ) -> None:
        assert stream == STREAM, f"{name} was launched on stream {stream or 0:#x} instead of {STREAM:#x}"
        text = self.entries[name]
        most = re.search(r"\.maxntid\s+(\d+)", text)
        assert most is None or block[0] <= int(most[1]), f"{name}: {block[0]} threads, compiled for {most and most[1]}"
        loaded = program(text, name)
        packed = bytearray(max((p.offset + p.size for p in loaded.kernel.parameters), default=0))
        for given, parameter in zip(arguments, loaded.kernel.parameters, strict=False):  # arguments has no length
            packed[parameter.offset : parameter.offset + parameter.size] = ctypes.string_at(given, parameter.size)
        report = loaded.launch(grid, block, bytes(packed), self.extents, shared, Options(races=True, noise=True))
        report.kernel = plain_name(name)
        self.launches.append(report)


@lru_cache(maxsize=64)
def entries(path: Path) -> dict[str, str]:
    """Each kernel of a file by its name, as a module of its own: what is shared by others is out of bounds."""
    head, *bodies = re.split(r"(?m)^(?=(?:\.visible |\.weak )?\.entry )", path.read_text())
    found = {}
    for body in bodies:
        name = re.match(r"(?:\.visible |\.weak )?\.entry\s+([\w$]+)", body)
        assert name is not None
        found[name[1]] = head + body
    return found


@cache
def program(text: str, name: str) -> Program:
    return Program(text, name)


def plain_name(mangled: str) -> str:
    """``histogram_kernel`` of ``_ZN7feather4cuda16histogram_kernelIfEEvPK...``."""
    found = re.match(r"_ZN7feather4cuda\d+([a-z_]+)", mangled)
    return mangled if found is None else found[1]
