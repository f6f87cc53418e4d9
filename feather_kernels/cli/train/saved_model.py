"""The finished model of a run, as a module of this process."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING

from feather_kernels.cli.errors import InputError
from feather_kernels.cli.train.models import make_model
from feather_kernels.cli.train.run_folder import CONFIG, MODEL

if TYPE_CHECKING:
    from torch import nn


def load_model(folder: str | PathLike[str]) -> nn.Module:
    """Rebuild the network of a finished run and load its weights, on the CPU and in evaluation mode.

    Args:
        folder: of the run, e.g. ``runs/digits-cnn-0.95``.

    Returns:
        A dense model (B, channels, H, W) -> (B, classes). It takes images as the training made them: float32, less the
        mean of each channel of ``x_train`` and divided by its standard deviation.

    Raises:
        InputError: a ValueError; the folder is not that of a finished run, or torchvision, which has its network, is
            missing.
    """
    from safetensors.torch import load_file

    path = Path(folder)
    for name in (CONFIG, MODEL):
        if not (path / name).is_file():
            raise InputError(f"folder must be that of a finished run, got {str(path)!r}: no {name}")
    content = json.loads((path / CONFIG).read_text())
    data = content["data"]
    model = make_model(content["options"]["model"], data["image_shape"][-1], data["classes"], seed=0)
    model.load_state_dict(load_file(path / MODEL))
    return model.eval()
