"""A stand-in for NVIDIA's driver: it lets a machine without a GPU time what the GPU path costs the host.

Triton's JIT and C launcher run as they are, on CPU tensors, over a libcuda whose calls return at once (libcuda.c). No
kernel runs, so no result means anything. What a launch costs in the real driver (about 4 us) and what the device does
are not seen. It needs triton, gcc and Python's headers, and holds for the process: take one of its own.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

SOURCE = Path(__file__).with_name("libcuda.c")
COMPUTE_CAPABILITY = 90


def missing() -> str | None:
    """What it needs and this machine lacks, or None."""
    if importlib.util.find_spec("triton") is None:
        return "the stand-in for NVIDIA's driver needs triton, which is not installed"
    if shutil.which("gcc") is None:
        return "the stand-in for NVIDIA's driver needs gcc, which is not on the path"
    return None


def activate() -> Callable[[], int]:
    """Build the stand-in and make it Triton's driver; returns a function that says how many kernels were launched.

    Raises:
        RuntimeError: something is ``missing``.
    """
    if reason := missing():
        raise RuntimeError(reason)
    library = build()
    os.environ["TRITON_LIBCUDA_PATH"] = str(library.parent)  # where Triton links its launcher to libcuda
    loaded = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    use_driver()
    launches = ctypes.c_ulonglong.in_dll(loaded, "launches")
    return lambda: launches.value


def build() -> Path:
    """Compile libcuda.so.1 in a folder that goes with the process; returns its path."""
    folder = tempfile.mkdtemp(prefix="feather-stand-in-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    library = Path(folder) / "libcuda.so.1"
    name = f"-Wl,-soname,{library.name}"
    subprocess.run(["gcc", "-shared", "-fPIC", "-O2", name, "-o", library, SOURCE], check=True)
    library.with_name("libcuda.so").symlink_to(library.name)
    return library


def use_driver() -> None:
    """Make Triton's own CUDA driver active, for CPU tensors on the default stream."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia import driver as nvidia

    class Driver(nvidia.CudaDriver):
        def __init__(self) -> None:
            self.utils = nvidia.CudaUtils()
            self.launcher_cls = nvidia.CudaLauncher
            self.get_device_capability = lambda device=0: divmod(COMPUTE_CAPABILITY, 10)  # noqa: ARG005
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None  # noqa: ARG005
            self.get_current_stream = lambda device=0: 0  # noqa: ARG005

        def get_current_target(self) -> Any:
            return GPUTarget("cuda", COMPUTE_CAPABILITY, 32)

        def get_active_torch_device(self) -> torch.device:
            return torch.device("cpu")

    triton.runtime.driver.set_active(Driver())
