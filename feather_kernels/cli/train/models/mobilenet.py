"""MobileNetV1 (Howard et al. 2017, table 1) for images of 32 pixels."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from feather_kernels.cli.train.models.cnn import conv_norm

STEM = 32  # channels
BLOCKS = (  # output channels and stride of the 13 blocks
    *((64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2)),
    *[(512, 1)] * 5,
    *((1024, 2), (1024, 1)),
)


class MobileNetV1(nn.Module):
    """3x3 convolution, 13 depthwise-separable blocks, mean, linear; 28 prunable weights.

    The first convolution has stride 1 instead of ImageNet's 2, so that 2x2 of 32x32 pixels are left at the end. With
    100 classes, the prunable weights have 3,287,488 elements, like the network of the Feather paper.
    """

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv, self.norm = conv_norm(channels, STEM)
        widths_in = (STEM, *(width for width, _ in BLOCKS))
        self.blocks = nn.Sequential(
            *(
                SeparableBlock(width_in, width, stride)
                for width_in, (width, stride) in zip(widths_in, BLOCKS, strict=False)
            )
        )
        self.classifier = nn.Linear(BLOCKS[-1][0], classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, classes)."""
        hidden = F.relu(self.norm(self.conv(images)))
        return self.classifier(self.blocks(hidden).mean((2, 3)))


class SeparableBlock(nn.Module):
    """A 3x3 convolution of each channel alone, then a 1x1 convolution across them; batch norm and relu after both."""

    def __init__(self, width_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.depthwise, self.norm1 = conv_norm(width_in, width_in, stride, groups=width_in)
        self.pointwise, self.norm2 = conv_norm(width_in, width, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, width_in, H, W) -> (B, width, ceil(H / stride), ceil(W / stride))."""
        hidden = F.relu(self.norm1(self.depthwise(x)))
        return F.relu(self.norm2(self.pointwise(hidden)))
