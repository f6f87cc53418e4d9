"""The command line: training and comparing, warm-up, self-test, GPU report, diagnosis."""

from feather_kernels.cli.main import main

__all__ = ["main"]
