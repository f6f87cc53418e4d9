"""ONNX has no such ops: in both of torch's exporters they raise an error that says what to do."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

import torch

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def refuse_onnx() -> None:
    """Raise RuntimeError inside ``torch.onnx.export``. The check takes 1.4 us: call it only under tracers."""
    if torch.onnx.is_in_onnx_export():
        raise RuntimeError(
            "ONNX has no operator feather_kernels::threshold, with which a live sparse model computes its weights: "
            "finalize a copy of the model first, and export that"
        )


def not_in_onnx(fake: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Wrap the fake implementation of an op, which exporters call, so that it raises in an export to ONNX."""

    @wraps(fake)
    def run(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        refuse_onnx()
        return fake(*args, **kwargs)

    return run
