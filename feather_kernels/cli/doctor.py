"""``feather-kernels doctor``: versions, devices, and for each backend whether it can run or why not."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch

from feather_kernels._version import __version__
from feather_kernels.backends import cpp, cuda
from feather_kernels.backends.registry import registry
from feather_kernels.cli import nvidia_driver
from feather_kernels.cli.counted import counted
from feather_kernels.cli.errors import InputError

if TYPE_CHECKING:
    import argparse


def run(options: argparse.Namespace) -> int:  # noqa: ARG001
    """Print what ``examine`` finds; returns the exit code 0.

    Raises:
        InputError: see ``examine``.
    """
    print(examine())
    return 0


def examine() -> str:
    """Describe versions, devices and backends, as plain text of several lines.

    Raises:
        InputError: FEATHER_KERNELS_BACKEND names no backend.
    """
    try:
        registry.requested()
    except ValueError as error:
        raise InputError(str(error)) from error
    value = os.environ.get(registry.ENVIRONMENT_VARIABLE)
    lines = [
        f"feather_kernels {__version__}",
        f"python          {platform.python_version()}",
        f"torch           {torch.__version__}",
        f"triton          {version('triton')}",
        f"CUDA of torch   {torch.version.cuda or 'none (built for CPU)'}",
        *_cuda_module(nvidia_driver.installed()),
        "",
        f"{registry.ENVIRONMENT_VARIABLE} {'is not set' if value is None else f'= {value!r}'}",
    ]
    for device, description in _devices():
        lines += ["", f"{device}: {description}", *_backends(device)]
    if torch.cuda.device_count() == 0:
        lines += ["", f"cuda: {nvidia_driver.no_device()}", *_gpu_backends()]
    return "\n".join(lines)


def _cuda_module(driver: nvidia_driver.Driver | None) -> list[str]:
    """The lines about the driver and the CUDA module, with a remark if the driver is too old for it."""
    reason = cuda.load_module()
    facts = [reason] if reason else cuda.description()
    old = not reason and driver is not None and driver.cuda < (cuda.runtime_major(), 0)
    found = f"{driver or 'none found'}" + (": older than the CUDA module needs" if old else "")
    first, *rest = facts
    return [f"NVIDIA driver   {found}", f"CUDA module     {first}", *(f"                {fact}" for fact in rest)]


def _devices() -> Iterator[tuple[torch.device, str]]:
    yield torch.device("cpu"), counted(torch.get_num_threads(), "thread")
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        memory = f"{facts.total_memory / 2**30:.1f} GiB"
        yield torch.device("cuda", index), f"{facts.name}, compute capability {facts.major}.{facts.minor}, {memory}"


def _backends(device: torch.device) -> list[str]:
    try:
        chosen = registry.chosen_name(device)
    except RuntimeError as error:
        chosen = f"none: {error}"
    lines = []
    for name, reason in registry.availability(device).items():
        lines.append(f"  {name}: {reason or 'available'}")
        if name == "cpp" and reason is None:
            lines += [f"    {fact}" for fact in cpp.description()]
    return [*lines, f"  chosen: {chosen}"]


def _gpu_backends() -> list[str]:
    """The backends that only a GPU can run, each with the reason why it cannot run without one."""
    found = registry.availability(torch.device("cuda", 0))
    return [f"  {name}: {reason or 'available'}" for name, reason in found.items() if name != "reference"]


def version(package: str, missing: str = "not installed") -> str:
    """The version of an installed package, or ``missing`` if there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return missing
