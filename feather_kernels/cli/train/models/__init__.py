"""The networks that can be trained: a small CNN, the Feather paper's for images of 32 pixels, and torchvision's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from feather_kernels.cli.near_names import unknown_name
from feather_kernels.cli.train.models.cnn import SmallCNN
from feather_kernels.cli.train.models.densenet import DenseNet40
from feather_kernels.cli.train.models.mobilenet import MobileNetV1
from feather_kernels.cli.train.models.resnet import ResNet20
from feather_kernels.cli.train.models.torchvision_models import (
    PREFIX,
    check_torchvision_model,
    is_torchvision,
    make_torchvision_model,
    torchvision_name,
)

__all__ = ["DEFAULT_MODEL", "MODELS", "check_model", "is_torchvision", "make_model"]

MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "cnn": SmallCNN,
    "resnet20": partial(ResNet20, widths=(32, 64, 128)),
    "resnet20-16": partial(ResNet20, widths=(16, 32, 64)),
    "mobilenetv1": MobileNetV1,
    "densenet40-24": partial(DenseNet40, growth=24),
}
DEFAULT_MODEL = "cnn"


def check_model(name: str) -> None:
    """Raise InputError unless ``name`` is a key of ``MODELS``, or ``torchvision:`` and a classifier of torchvision."""
    if is_torchvision(name):
        check_torchvision_model(name)
    elif name not in MODELS:
        raise unknown_name("--model", name, MODELS, otherwise=f"{PREFIX}NAME", exact=torchvision_name(name))


def make_model(name: str, channels: int, classes: int, seed: int) -> nn.Module:
    """A new model in float32; it depends on the arguments alone and leaves torch's own generator as it is.

    Convolutions get He initialisation (normal, fan in). Linear layers and torchvision's networks keep their own.

    Args:
        name: one that ``check_model`` accepts.
        channels: the number of channels of the images.
        classes: the number of outputs.
        seed: of the initialisation.

    Returns:
        A module (B, channels, H, W) -> (B, classes).

    Raises:
        InputError: the network does not take images with so many channels.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if is_torchvision(name):
            return make_torchvision_model(name, channels, classes)
        model = MODELS[name](channels, classes)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model
