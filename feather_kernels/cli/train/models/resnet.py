"""The CIFAR ResNet-20 (He et al. 2015, section 4.2)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from feather_kernels.cli.train.models.cnn import conv_norm


class ResNet20(nn.Module):
    """3x3 convolution, three stages of three basic blocks, mean, linear; 22 prunable weights.

    Where the shape changes, the shortcut is a 1x1 convolution with batch norm. With widths 32-64-128 and 100 classes,
    the prunable weights have 1,092,960 elements, like the network of the Feather paper.
    """

    def __init__(self, channels: int, classes: int, widths: tuple[int, int, int]) -> None:
        super().__init__()
        self.conv, self.norm = conv_norm(channels, widths[0], 1)
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
        self.conv1, self.norm1 = conv_norm(width_in, width, stride)
        self.conv2, self.norm2 = conv_norm(width, width, 1)
        same = width_in == width and stride == 1
        self.shortcut = nn.Sequential() if same else nn.Sequential(*conv_norm(width_in, width, stride, kernel_size=1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, ceil(H / stride), ceil(W / stride))."""
        hidden = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(hidden)) + self.shortcut(x))
