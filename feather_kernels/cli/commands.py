"""The command ``feather-kernels``: its commands, each with its module, and how errors become exit codes.

An error that the user can fix is one line on stderr and exit code 2; anything else that goes wrong keeps its traceback.
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from feather_kernels._version import __version__
from feather_kernels.cli import options as command_options
from feather_kernels.cli.errors import InputError
from feather_kernels.cli.near_names import nearest
from feather_kernels.errors import BackendUnavailableError

USER_ERROR, INTERRUPTED, NO_READER = 2, 130, 141  # exit codes; the last two are those of SIGINT and SIGPIPE


class Command(NamedTuple):
    """A command of the command line.

    Attributes:
        module: below ``feather_kernels.cli``; its function ``run`` takes the parsed options and returns the exit code.
        add_options: adds the options of the command to its parser.
        help: one line for the list of commands.
        description: the text above the options in the help of the command.
    """

    module: str
    add_options: Callable[[argparse.ArgumentParser], None]
    help: str
    description: str


COMMANDS = {
    "train": Command(
        "train.command",
        command_options.add_train_options,
        "train a network to a sparsity",
        "Train a network to a sparsity, and write its metrics, checkpoint, model and report.",
    ),
    "compare": Command(
        "compare.command",
        command_options.add_compare_options,
        "train a grid of methods, sparsities and seeds, and tabulate it",
        "Train a grid of methods, sparsities and seeds, and write its table and figures. The same command continues an "
        "interrupted grid. The exit code is 1 if a cell has failed twice.",
    ),
    "warmup": Command(
        "warmup",
        command_options.add_warmup_options,
        "compile the Triton kernels ahead, so that no training step waits for them",
        "Compile the Triton kernels ahead, into Triton's cache on disk. The exit code is 1 if Triton cannot run.",
    ),
    "selftest": Command(
        "selftest.command",
        command_options.add_selftest_options,
        "test every op on every backend of a device against exact values",
        "Test every op on every backend of a device against exact values. The exit code is 1 if a test fails.",
    ),
    "gpu-report": Command(
        "gpu_report.command",
        command_options.add_gpu_report_options,
        "test and measure the package on a GPU",
        "Test and measure every op on a GPU in under five minutes, and write one JSON and one Markdown file.",
    ),
    "doctor": Command(
        "doctor",
        command_options.add_no_options,
        "print versions, devices and backends",
        "Print versions, devices, and which backends can run on each device.",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        arguments: those after the name of the program; None for those of this process. Without any, it is ``doctor``.
    """
    try:
        options = _parse(sys.argv[1:] if arguments is None else arguments)
        # imported only now, so that doctor works where the module of another command cannot be imported
        module = importlib.import_module(f"feather_kernels.cli.{COMMANDS[options.command].module}")
        exit_code: int = module.run(options)
        sys.stdout.flush()  # here, where a reader that has left, such as head, can be told from other errors
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it exits
        return NO_READER
    except (InputError, OSError, BackendUnavailableError) as error:
        print(f"feather-kernels: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("feather-kernels: interrupted", file=sys.stderr)
        return INTERRUPTED
    return exit_code


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; it raises InputError where argparse would exit."""
    parser = _Parser(prog="feather-kernels", description="Sparse training with Feather.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"feather_kernels {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", dest="command", required=True)
    for name, command in COMMANDS.items():
        own = subparsers.add_parser(name, help=command.help, description=command.description, allow_abbrev=False)
        command.add_options(own)
    return parser


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; raises InputError, with the nearest option of the command, if one is unknown."""
    options, unknown = make_parser().parse_known_args(arguments or ["doctor"])
    if unknown:
        own = _Parser(prog=f"feather-kernels {options.command}", allow_abbrev=False)
        COMMANDS[options.command].add_options(own)
        known = re.findall(r"--[\w-]+", own.format_usage())
        first = next((word for word in unknown if word.startswith("-")), "")
        near = nearest(first.partition("=")[0], known, count=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        own.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return options


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")
