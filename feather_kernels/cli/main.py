"""The command ``feather-kernels``: finds the function of each command and turns errors into exit codes.

An error that the user can fix is one line on stderr and exit code 2; anything else that goes wrong keeps its traceback.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from feather_kernels._version import __version__
from feather_kernels.cli import options as command_options
from feather_kernels.cli.errors import InputError
from feather_kernels.errors import BackendUnavailableError

USER_ERROR, INTERRUPTED = 2, 130  # exit codes


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return the exit code.

    Args:
        arguments: those after the name of the program; None for those of this process.
    """
    try:
        options = make_parser().parse_args(arguments)
        return options.command(options)
    except (InputError, OSError, BackendUnavailableError) as error:
        print(f"feather-kernels: error: {' '.join(str(error).split())}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print("feather-kernels: interrupted", file=sys.stderr)
        return INTERRUPTED


def make_parser() -> argparse.ArgumentParser:
    """The parser of the whole command line; it raises InputError where argparse would exit."""
    parser = _Parser(prog="feather-kernels", description="Sparse training with Feather.", allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"feather_kernels {__version__}")
    subparsers = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        about = command.description or f"{command.help[0].upper()}{command.help[1:]}."
        own = subparsers.add_parser(name, help=command.help, description=about, allow_abbrev=False)
        command.add_options(own)
        own.set_defaults(**{command_options.COMMAND: command.run})
    return parser


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


# Each command imports its modules when it runs: `doctor` must work where another command cannot be imported.


def _train(options: argparse.Namespace) -> int:
    from feather_kernels.cli.train import command

    return command.run(options)


def _compare(options: argparse.Namespace) -> int:
    from feather_kernels.cli.compare import command

    return command.run(options)


def _warmup(options: argparse.Namespace) -> int:
    from feather_kernels.cli import warmup

    return warmup.run(options)


def _selftest(options: argparse.Namespace) -> int:
    from feather_kernels.cli.selftest import command

    return command.run(options)


def _gpu_report(options: argparse.Namespace) -> int:
    from feather_kernels.cli.gpu_report import command

    return command.run(options)


def _doctor(options: argparse.Namespace) -> int:
    from feather_kernels.cli import doctor

    return doctor.run(options)


class Command(NamedTuple):
    """A command: its function, which returns the exit code, its options, and its texts.

    ``help`` stands in the list of commands, ``description`` above the command's own help; by default both are the same.
    """

    run: Callable[[argparse.Namespace], int]
    add_options: Callable[[argparse.ArgumentParser], None]
    help: str
    description: str | None = None


COMMANDS = {
    "train": Command(
        _train,
        command_options.add_train_options,
        "train a network to a sparsity",
        "Train a network to a sparsity, and write its metrics, checkpoint, model and report.",
    ),
    "compare": Command(
        _compare,
        command_options.add_compare_options,
        "train a grid of methods, sparsities and seeds, and tabulate it",
        "Train a grid of methods, sparsities and seeds, and write its table and figures. The same command continues an "
        "interrupted grid. The exit code is 1 if a cell has failed twice.",
    ),
    "warmup": Command(
        _warmup,
        command_options.add_warmup_options,
        "compile the Triton kernels ahead, so that no training step waits for them",
        "Compile the Triton kernels ahead, into Triton's cache on disk. The exit code is 1 if Triton cannot run.",
    ),
    "selftest": Command(
        _selftest,
        command_options.add_selftest_options,
        "test every op on every backend of a device against exact values",
        "Test every op on every backend of a device against exact values. The exit code is 1 if a test fails.",
    ),
    "gpu-report": Command(
        _gpu_report,
        command_options.add_gpu_report_options,
        "test and measure everything on a GPU in under five minutes, into one JSON and one Markdown file",
    ),
    "doctor": Command(_doctor, command_options.add_doctor_options, "print versions, devices and backends"),
}
