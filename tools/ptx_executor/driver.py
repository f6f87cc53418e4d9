"""A Triton driver without a GPU: Triton compiles ``kernel[grid](cpu_tensors)`` as for a GPU, and the PTX runs here.

    with simulated_gpu(90) as gpu:
        gpu.expose(weights)
        kernel[grid](x, table_of_addresses, n, BLOCK=1024)
    assert gpu.launches[-1].bytes_read == ...

``TRITON_INTERPRET`` must be unset when the kernels are imported.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
from torch.multiprocessing.reductions import StorageWeakRef
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase

from tools.ptx_executor.execution import LaunchReport, Options, Program
from tools.ptx_executor.lanes import WARP_SIZE
from tools.ptx_executor.memory import extent

SHARED_BYTES = {80: 166912, 90: 232448, 100: 232448, 120: 101376}
_FORMATS = {"fp16": "e", "fp32": "f", "fp64": "d"}
_DEVICES = itertools.count(1000)  # beyond those of architectures


@contextlib.contextmanager
def simulated_gpu(
    arch: int = 90, *, races: bool = True, noise: bool = False, seed: int = 0, execute: bool = True
) -> Iterator[PtxDriver]:
    """Make a simulated GPU of compute capability ``arch`` (80: sm_80) Triton's active driver.

    Without ``execute`` launches do no more than compile and load, and nothing that was compiled before is reused.
    """
    if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
        raise RuntimeError("TRITON_INTERPRET must be unset: interpreted kernels are never compiled to PTX")
    config, hook = triton.runtime.driver, triton.knobs.runtime.kernel_load_start_hook
    before = config._active
    driver = PtxDriver(arch, Options(races=races, noise=noise, seed=seed), execute)
    config.set_active(driver)
    hook.add(driver.remember_files)
    try:
        yield driver
    finally:
        hook.remove(driver.remember_files)
        config._active = before


@dataclass(frozen=True)
class LoadedKernel:
    """A kernel that Triton compiled and loaded: its name and the files of the compilation by suffix (``.ptx``, ...)."""

    name: str
    files: dict[str, Path]


class PtxDriver(DriverBase):
    """The driver.

    ``launches`` has a LaunchReport for every launch, ``loaded`` every kernel that was loaded, ``sources`` what it was
    compiled from (Triton's ASTSource).
    """

    def __init__(self, arch: int, options: Options, execute: bool) -> None:
        self.arch, self.options, self.execute = arch, options, execute
        self.device = arch if execute else next(_DEVICES)
        self.launches: list[LaunchReport] = []
        self.loaded: list[LoadedKernel] = []
        self.sources: list[Any] = []
        self._exposed: list[tuple[StorageWeakRef, tuple[int, int]]] = []
        self.utils = _Utilities(self)
        self.launcher_cls = _Launcher

    def expose(self, tensors: Iterable[torch.Tensor]) -> None:
        """Let kernels reach the memory of ``tensors`` through addresses that they load, for as long as it lives.

        It is not kept alive here: a kernel that reads what was freed before its launch is out of bounds.
        """
        self._exposed += [(StorageWeakRef(tensor.untyped_storage()), extent(tensor)) for tensor in tensors]

    def exposed(self) -> list[tuple[int, int]]:
        """(address, bytes) of what is exposed and lives."""
        self._exposed = [(storage, extent) for storage, extent in self._exposed if not storage.expired()]
        return [extent for _, extent in self._exposed]

    def remember_files(self, module: Any, function: Any, name: str, metadata_group: dict[str, str], key: str) -> None:
        """Hook: Triton hands the driver the cubin only; the PTX of the same compilation lies beside it."""
        self.loaded.append(LoadedKernel(name, {Path(path).suffix: Path(path) for path in metadata_group.values()}))

    @classmethod
    def is_active(cls) -> bool:
        """Triton may always choose it."""
        return True

    def get_current_target(self) -> GPUTarget:
        """What Triton compiles for."""
        return GPUTarget("cuda", self.arch, WARP_SIZE)

    def get_current_device(self) -> int:
        """A number for each architecture: Triton keeps binaries by device."""
        return self.device

    def set_current_device(self, device: int) -> None:
        """There is one device."""

    def get_current_stream(self, device: int | None = None) -> int:
        """The default stream; there is no other."""
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        """Major and minor number of the compute capability."""
        return divmod(self.arch, 10)

    def get_active_torch_device(self) -> torch.device:
        """Tensors live on the CPU."""
        return torch.device("cpu")

    def get_device_interface(self) -> Any:
        """The module of torch that manages the device."""
        return torch.cpu

    def map_python_to_cpp_type(self, name: str) -> str:
        """Triton's own name: no C launcher is generated."""
        return name

    def get_benchmarker(self) -> Any:
        """Raise NotImplementedError: nothing can be timed."""
        raise NotImplementedError("a simulated GPU has no time to measure")

    def get_empty_cache_for_benchmark(self) -> torch.Tensor:
        """Raise NotImplementedError: there is no cache to flush."""
        raise NotImplementedError("a simulated GPU has no cache")

    def clear_cache(self, cache: torch.Tensor) -> None:
        """There is no cache."""


class _Utilities:
    """What Triton asks of a device when it loads a kernel."""

    def __init__(self, driver: PtxDriver) -> None:
        self.driver = driver

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {
            "max_shared_mem": SHARED_BYTES.get(self.driver.arch, min(SHARED_BYTES.values())),
            "multiprocessor_count": 132,
            "warpSize": WARP_SIZE,
            "max_num_regs": 65536,
            "sm_clock_rate": 1,
            "mem_clock_rate": 1,
            "mem_bus_width": 1,
        }

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[int, Any, int, int, int]:
        """(module, function, registers, spills, threads at most)."""
        latest = self.driver.loaded[-1]
        if latest.name != name:
            raise RuntimeError(f"no PTX was announced for kernel {name}")
        program = Program(latest.files[".ptx"].read_text(), name) if self.driver.execute else None
        return 1, program, 32, 0, 1024

    def unload_module(self, module: int) -> None:
        """Modules are garbage collected."""


class _Launcher:
    """Called by the JIT for each launch, in place of the C launcher."""

    def __init__(self, source: Any, metadata: Any) -> None:
        self.types = list(source.signature.values())
        self.metadata = metadata
        triton.runtime.driver.active.sources.append(source)

    def __call__(
        self,
        grid_x: int,
        grid_y: int,
        grid_z: int,
        stream: int,
        program: Program,
        kernel_metadata: Any,
        launch_metadata: Any,
        enter_hook: Any,
        exit_hook: Any,
        *arguments: Any,
    ) -> None:
        driver: PtxDriver = triton.runtime.driver.active
        grid = (grid_x, grid_y, grid_z)
        if 0 in grid or not driver.execute:
            return
        given = [(value, kind) for value, kind in zip(arguments, self.types, strict=True) if kind != "constexpr"]
        tensors = [value for value, _ in given if isinstance(value, torch.Tensor)]
        extents = [*map(extent, tensors), *driver.exposed()]
        pointers = [int(extent(scratch)[0]) for scratch in self._scratch(grid, extents)]
        values = [*(_pack(value, kind) for value, kind in given), *(struct.pack("<q", p) for p in pointers)]
        block = bytearray(sum(parameter.size + 16 for parameter in program.kernel.parameters))
        for parameter, raw in zip(program.kernel.parameters, values, strict=False):
            block[parameter.offset : parameter.offset + parameter.size] = raw[: parameter.size]
        threads = self.metadata.num_warps * WARP_SIZE
        report = program.launch(grid, (threads,), bytes(block), extents, self.metadata.shared, driver.options)
        driver.launches.append(report)

    def _scratch(self, grid: tuple[int, int, int], extents: list[tuple[int, int]]) -> list[torch.Tensor]:
        """The global scratch that Triton passes after the arguments."""
        size = getattr(self.metadata, "global_scratch_size", 0) * int(np.prod(grid))
        if not size:
            return []
        self.scratch = torch.empty(size, dtype=torch.uint8)
        extents.append(extent(self.scratch))
        return [self.scratch]


def _pack(value: Any, kind: str) -> bytes:
    """A kernel argument of Triton type ``kind`` as 8 bytes or more."""
    if isinstance(value, torch.Tensor):
        return struct.pack("<Q", value.data_ptr())
    if kind in _FORMATS:
        return struct.pack(f"<{_FORMATS[kind]}", float(value)).ljust(8, b"\0")
    if kind == "bf16":
        return struct.pack("<f", torch.tensor(value, dtype=torch.bfloat16).item())[2:].ljust(8, b"\0")
    if kind[0] in "iu*":
        return (int(value) & (2**64 - 1)).to_bytes(8, "little")
    raise ValueError(f"cannot pass {value!r} as {kind}")
