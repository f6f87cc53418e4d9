"""A small CNN for images of any size, and the layers that the networks share."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


def conv_norm(
    width_in: int, width: int, stride: int = 1, kernel_size: int = 3, groups: int = 1
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    """A convolution that keeps the size at stride 1, and the batch norm that stands in for its bias."""
    conv = nn.Conv2d(width_in, width, kernel_size, stride, padding=kernel_size // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(width)


class SmallCNN(nn.Module):
    """Three 3x3 convolutions with batch norm (widths 32, 64, 128; stride 2 from the second on), mean, linear."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = conv_norm(channels, 32, 1)
        self.conv2, self.norm2 = conv_norm(32, 64, 2)
        self.conv3, self.norm3 = conv_norm(64, 128, 2)
        self.classifier = nn.Linear(128, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, channels, H, W) -> (B, classes)."""
        hidden = F.relu(self.norm1(self.conv1(images)))
        hidden = F.relu(self.norm2(self.conv2(hidden)))
        hidden = F.relu(self.norm3(self.conv3(hidden)))
        return self.classifier(hidden.mean((2, 3)))
