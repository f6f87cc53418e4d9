"""Networks of torchvision, by name."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from feather_kernels.cli.errors import InputError
from feather_kernels.cli.near_names import nearest

if TYPE_CHECKING:
    from torch import nn

PREFIX = "torchvision:"
CHANNELS = 3  # that they take


def check_name(name: str) -> None:
    """Raise InputError unless ``name``, without the prefix, is a classifier that torchvision has."""
    if importlib.util.find_spec("torchvision") is None:
        raise InputError(f'--model {PREFIX}{name} needs torchvision: pip install "feather_kernels[train]"')
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        near = nearest(name, known)
        choices = f", such as {', '.join(near)}" if near else f": {', '.join(known)}"
        raise InputError(
            f"--model {PREFIX}NAME must be one of torchvision's {len(known)} classifiers{choices}; got {name!r}"
        )


def make_torchvision_model(name: str, channels: int, classes: int) -> nn.Module:
    """A classifier of torchvision with its own initialisation; the name is one that ``check_name`` lets pass.

    Raises:
        InputError: the images are not in colour.
    """
    from torchvision import models

    if channels != CHANNELS:
        raise InputError(f"--model {PREFIX}{name} takes images with {CHANNELS} channels, got {channels}")
    return models.get_model(name, weights=None, num_classes=classes)
