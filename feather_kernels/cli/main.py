"""The command ``feather-kernels``: ``train``, ``compare``, ``warmup``, ``selftest``, ``gpu-report`` and ``doctor``.

What a user can mend is one line on stderr and exit code 2; anything else that goes wrong keeps its traceback.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from feather_kernels._version import __version__
from feather_kernels.cli.errors import InputError
from feather_kernels.cli.train.options import add_compare_options, add_train_options
from feather_kernels.errors import BackendUnavailableError

USER_ERROR, INTERRUPTED = 2, 130  # exit codes
GPU_REPORT = "Check and measure everything on a GPU in under five minutes, into one JSON and one Markdown file."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line (default: of this process) and return the exit code."""
    try:
        options = make_parser().parse_args(arguments)
        return options.command(options)
    except (InputError, OSError, BackendUnavailableError) as error:
        print(f"feather-kernels: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("feather-kernels: interrupted", file=sys.stderr)
        return INTERRUPTED


class _Parser(argparse.ArgumentParser):
    """Raises InputError where argparse would print its usage and exit."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; its options carry the function that runs them as ``command``."""
    parser = _Parser(prog="feather-kernels", description="Sparse training with Feather.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"feather_kernels {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    train = commands.add_parser(
        "train",
        help="train a small network to a sparsity and write a report",
        description="Train a network with Feather to a sparsity, and write metrics, checkpoint, model and report.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # so that what was given can be told from defaults
    )
    add_train_options(train)
    train.set_defaults(command=_train)
    compare = commands.add_parser(
        "compare",
        help="train a grid of methods, sparsities and seeds, and write its table",
        description="Train a grid of methods, sparsities and seeds; the same command continues it. Exit code 1 if a "
        "cell has failed twice.",
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    add_compare_options(compare)
    compare.set_defaults(command=_compare)
    warmup = commands.add_parser(
        "warmup",
        help="compile the Triton kernels ahead, so that no training step waits for them",
        description="Compile the Triton kernels ahead, into Triton's cache on disk. Exit code 1 if Triton cannot run.",
        allow_abbrev=False,
    )
    warmup.add_argument("--dtype", metavar="DTYPE", nargs="+", help="of weights (default float32 bfloat16 float16)")
    warmup.add_argument("--device", metavar="DEVICE", nargs="+", help="default every CUDA device")
    warmup.set_defaults(command=_warmup)
    selftest = commands.add_parser(
        "selftest",
        help="test every op on every backend of a device against exact values",
        description="Test every op on every backend that a device offers against exact values; exit code 1 on failure.",
        allow_abbrev=False,
    )
    selftest.add_argument("--device", metavar="DEVICE", help="default cuda if available, else cpu")
    selftest.add_argument("--require", metavar="BACKEND", nargs="+", default=[], help="fail if one of these cannot run")
    selftest.add_argument("--json", metavar="FILE", help="write the result to this file too")
    selftest.add_argument("--junit", metavar="FILE", help="write the result as JUnit XML too, for CI")
    selftest.set_defaults(command=_selftest)
    _add_gpu_report(commands.add_parser("gpu-report", help=GPU_REPORT, description=GPU_REPORT, allow_abbrev=False))
    doctor = commands.add_parser("doctor", help="print versions, devices and backends", allow_abbrev=False)
    doctor.set_defaults(command=_doctor)
    return parser


def _add_gpu_report(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--device", metavar="DEVICE", default="cuda", help="cuda (default) or cuda:N")
    add("--output", metavar="DIR", default=".", help="folder of gpu-report-NAME.json and .md (default this one)")
    add("--name", metavar="NAME", help="in the files' names (default that of the GPU)")
    add("--quick", action="store_true", help="small inputs and few rounds")
    add("--force", action="store_true", help="overwrite files that are there")
    add("--table", metavar="FILE", nargs="+", help="run nothing: print a page of the reports in these JSON files")
    parser.set_defaults(command=_gpu_report)


def _train(options: argparse.Namespace) -> int:
    world_size = os.environ.get("WORLD_SIZE", "1")  # of torchrun and other launchers
    if world_size not in ("", "1"):
        raise InputError(f"train must run as one process, got WORLD_SIZE={world_size} (torchrun?): start it by itself")
    from feather_kernels.cli.train import command

    given = {name: value for name, value in vars(options).items() if name != "command"}
    if "resume" not in given:
        return command.train(given)
    path, threads = given.pop("resume"), given.pop("threads", None)
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(f"--resume takes its options from config.json; only --threads may be given too, got {names}")
    return command.resume(path, threads)


def _compare(options: argparse.Namespace) -> int:
    from feather_kernels.cli.compare import command

    return command.run({name: value for name, value in vars(options).items() if name != "command"})


def _warmup(options: argparse.Namespace) -> int:
    import torch

    from feather_kernels.cli import warmup

    dtypes = options.dtype or warmup.DEFAULT_DTYPES
    for name in dtypes:
        if name not in warmup.DTYPES:
            raise InputError(f"--dtype must be of {', '.join(warmup.DTYPES)}, got {name!r}")
    names = options.device or [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    try:
        devices = [torch.device(name) for name in names]
    except RuntimeError as error:
        raise InputError(f"--device must be devices such as cuda:0, got {' '.join(names)}: {error}") from error
    return warmup.run(devices, dtypes)


def _selftest(options: argparse.Namespace) -> int:
    import torch

    from feather_kernels.backends.registry import registry
    from feather_kernels.cli import selftest

    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, dtype=torch.float32, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise InputError(f"--device must be a device of this machine, such as cuda:0, got {name!r}: {error}") from error
    for backend in options.require:
        if backend not in registry.modules:
            raise InputError(f"--require must be of {', '.join(registry.modules)}, got {backend!r}")
    return selftest.run(device, _file("--json", options.json), _file("--junit", options.junit), options.require)


def _file(option: str, name: str | None) -> Path | None:
    """The file to write at the end, once it is sure that it can be written."""
    if name is None:
        return None
    path = Path(name)
    try:
        path.open("a").close()
    except OSError as error:
        raise InputError(f"{option} must be a file that can be written, got {name!r}: {error.strerror}") from error
    return path


def _gpu_report(options: argparse.Namespace) -> int:
    import torch

    from feather_kernels.cli.gpu_report import machine, page, report

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
    folder, device = Path(options.output), f"cuda:{index}"
    return report.make(report.Request(folder, options.name, options.force, device, options.quick))


def _doctor(options: argparse.Namespace) -> int:  # noqa: ARG001
    from feather_kernels.cli import doctor

    print(doctor.examine())
    return 0
