"""torchvision's networks, under names such as ``torchvision:resnet50``."""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from feather_kernels.cli.errors import InputError
from feather_kernels.cli.near_names import nearest

if TYPE_CHECKING:
    from torch import nn

PREFIX = "torchvision:"
CHANNELS = 3  # of the images that they take


def is_torchvision(name: str) -> bool:
    """Whether the name is ``torchvision:NAME``."""
    return name.startswith(PREFIX)


def check_torchvision_model(name: str) -> None:
    """Raise InputError unless ``name`` is ``torchvision:`` and the name of a classifier that torchvision has."""
    if importlib.util.find_spec("torchvision") is None:
        raise InputError(f'--model {name} needs torchvision: pip install "feather_kernels[train]"')
    from torchvision import models

    known, own_name = models.list_models(module=models), name.removeprefix(PREFIX)
    if own_name not in known:
        near = nearest(own_name, known)
        choices = f", such as {', '.join(near)}" if near else f": {', '.join(known)}"
        raise InputError(
            f"--model {PREFIX}NAME must be one of torchvision's {len(known)} classifiers{choices}; got {own_name!r}"
        )


def torchvision_name(name: str) -> str | None:
    """``torchvision:NAME`` if torchvision is installed and has a classifier of this name, in whatever case."""
    if importlib.util.find_spec("torchvision") is None:
        return None
    from torchvision import models

    return f"{PREFIX}{name.lower()}" if name.lower() in models.list_models(module=models) else None


def make_torchvision_model(name: str, channels: int, classes: int) -> nn.Module:
    """A classifier with torchvision's own initialisation; ``name`` is one that ``check_torchvision_model`` accepts.

    Raises:
        InputError: the images are not in colour.
    """
    from torchvision import models

    if channels != CHANNELS:
        raise InputError(f"--model {name} takes images with {CHANNELS} channels, got {channels}")
    return models.get_model(name.removeprefix(PREFIX), weights=None, num_classes=classes)
