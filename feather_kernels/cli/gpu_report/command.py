"""``feather-kernels gpu-report``: from its options to a report, or to the page of many."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from feather_kernels.cli.errors import InputError
from feather_kernels.cli.gpu_report import machine, page, report

if TYPE_CHECKING:
    import argparse


def run(options: argparse.Namespace) -> int:
    """Write a report, or with ``--table`` print the page of many; returns the exit code: 1 without a GPU.

    Raises:
        InputError: the device, a file or the folder is not what it should be.
    """
    if options.table is not None:
        print(page.table([Path(name) for name in options.table]), end="")
        return 0
    found = re.fullmatch(r"cuda(?::(\d+))?", options.device)
    if found is None:
        raise InputError(f"--device must be cuda or cuda:N, got {options.device!r}")
    reason = machine.no_device()
    if reason is not None:
        print(f"feather-kernels: gpu-report needs an NVIDIA GPU: {reason}", file=sys.stderr)
        return 1
    index, count = int(found[1] or 0), torch.cuda.device_count()
    if index >= count:
        raise InputError(f"--device must be a device of this machine, cuda:0 to cuda:{count - 1}, got cuda:{index}")
    request = report.Request(Path(options.output), options.name, options.force, f"cuda:{index}", options.quick)
    return report.make(request)
