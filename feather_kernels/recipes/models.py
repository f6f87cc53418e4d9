"""Models of the recipe: a small CNN for any image size, and the CIFAR ResNet-20 (He et al. 2015, section 4.2)."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def make_model(name: str, channels: int, classes: int, seed: int) -> nn.Module:
    """A freshly initialised model in float32, a function of its arguments alone; torch's own generator is left as is.

    He initialisation of every convolution (normal, fan in); the linear layer keeps torch's.

    Args:
        name: a key of ``MODELS``.
        channels: channels of the images.
        classes: number of outputs.
        seed: of the initialisation.

    Returns:
        A module (B, channels, H, W) -> (B, classes).
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MODELS[name](channels, classes)
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return model


class SmallCNN(nn.Module):
    """Three 3x3 convolutions with batch norm (widths 32, 64, 128; stride 2 from the second on), mean, linear."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv_norm(channels, 32, 1)
        self.conv2, self.norm2 = _conv_norm(32, 64, 2)
        self.conv3, self.norm3 = _conv_norm(64, 128, 2)
        self.classifier = nn.Linear(128, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, classes)."""
        hidden = F.relu(self.norm1(self.conv1(images)))
        hidden = F.relu(self.norm2(self.conv2(hidden)))
        hidden = F.relu(self.norm3(self.conv3(hidden)))
        return self.classifier(hidden.mean((2, 3)))


class ResNet20(nn.Module):
    """3x3 convolution, three stages of three basic blocks, mean, linear; 22 prunable weights.

    The shortcut is a 1x1 convolution with batch norm where the shape changes. Widths 32-64-128 with 100 classes have
    1,092,960 prunable weights, the network of the Feather paper.
    """

    def __init__(self, channels: int, classes: int, widths: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv, self.norm = _conv_norm(channels, widths[0], 1)
        blocks = []
        for width_in, width, stride in zip((widths[0], *widths), widths, (1, 2, 2), strict=False):
            blocks += [BasicBlock(width_in, width, stride), BasicBlock(width, width, 1), BasicBlock(width, width, 1)]
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(widths[-1], classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, classes)."""
        hidden = F.relu(self.norm(self.conv(images)))
        return self.classifier(self.blocks(hidden).mean((2, 3)))


class BasicBlock(nn.Module):
    """``relu(norm(conv(relu(norm(conv(x))))) + shortcut(x))``."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = _conv_norm(width_in, width, stride)
        self.conv2, self.norm2 = _conv_norm(width, width, 1)
        same = width_in == width and stride == 1
        self.shortcut = nn.Sequential() if same else nn.Sequential(*_conv_norm(width_in, width, stride, kernel_size=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, ceil(H / stride), ceil(W / stride))."""
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))


MODELS: dict[str, Callable[[int, int], nn.Module]] = {
    "cnn": SmallCNN,
    "resnet20": partial(ResNet20, widths=(32, 64, 128)),
    "resnet20-16": partial(ResNet20, widths=(16, 32, 64)),
}
DEFAULT_MODEL = "cnn"


def _conv_norm(width_in: int, width: int, stride: int, kernel_size: int = 3) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    conv = nn.Conv2d(width_in, width, kernel_size, stride, padding=kernel_size // 2, bias=False)
    return conv, nn.BatchNorm2d(width)
