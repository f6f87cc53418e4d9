"""The command line ``feather-kernels``: one module or folder for each command, and ``main`` above them."""

from feather_kernels.cli.commands import main

__all__ = ["main"]
