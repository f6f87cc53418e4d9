"""DenseNet-BC (Huang et al. 2017) for images of 32 pixels."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BLOCKS, LAYERS = 3, 6  # dense blocks; layers in each
BOTTLENECK = 4  # channels between the two convolutions of a layer, in growth rates
REDUCTION = 0.5  # of the channels, in a transition


class DenseNet40(nn.Module):
    """3x3 convolution, three dense blocks of six layers with a transition after the first two, mean, linear.

    It has 40 prunable weights. With growth rate 24 and 100 classes they have 703,920 elements, like the DenseNet-40-24
    of the Feather paper.
    """

    def __init__(self, channels: int, classes: int, growth: int) -> None:
        super().__init__()
        width = 2 * growth
        self.conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        parts: list[nn.Module] = []
        for block in range(BLOCKS):
            parts += [DenseLayer(width + index * growth, growth) for index in range(LAYERS)]
            width += LAYERS * growth
            if block < BLOCKS - 1:
                parts.append(Transition(width, int(width * REDUCTION)))
                width = int(width * REDUCTION)
        self.blocks = nn.Sequential(*parts)
        self.norm = nn.BatchNorm2d(width)
        self.classifier = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, classes)."""
        hidden = F.relu(self.norm(self.blocks(self.conv(images))))
        return self.classifier(hidden.mean((2, 3)))


class DenseLayer(nn.Module):
    """Norm, relu, 1x1 convolution, norm, relu, 3x3 convolution; the output is appended to the input's channels."""

    def __init__(self, width: int, growth: int) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, BOTTLENECK * growth, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(BOTTLENECK * growth)
        self.conv2 = nn.Conv2d(BOTTLENECK * growth, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width, H, W) -> (B, width + growth, H, W)."""
        hidden = self.conv1(F.relu(self.norm1(x)))
        return torch.cat([x, self.conv2(F.relu(self.norm2(hidden)))], dim=1)


class Transition(nn.Module):
    """Norm, relu, 1x1 convolution to fewer channels, mean over 2x2 pixels."""

    def __init__(self, width_in: int, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width_in)
        self.conv = nn.Conv2d(width_in, width, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, ceil(H / 2), ceil(W / 2))."""
        return F.avg_pool2d(self.conv(F.relu(self.norm(x))), 2, ceil_mode=True)
