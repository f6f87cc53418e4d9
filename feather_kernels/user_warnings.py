"""Warnings that point at the user's code."""

from __future__ import annotations

import os
import sys
import warnings
from pathlib import Path

import torch

from feather_kernels.errors import SparsityWarning

_LIBRARIES = tuple(str(Path(file).parent) + os.sep for file in (torch.__file__, __file__))


def warn_user(message: str) -> None:
    """Give a SparsityWarning that points at the innermost caller outside of torch and of this package.

    Args:
        message: the text of the warning.
    """
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
    warnings.warn_explicit(message, SparsityWarning, frame.f_code.co_filename, frame.f_lineno)
