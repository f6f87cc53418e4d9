"""Small models for the tests, and ways to copy a model."""

from __future__ import annotations

import io
import pickle

import torch
from torch import nn
from torch.nn import functional as F


def conv_net(seed: int = 0) -> nn.Sequential:
    """(N, 3, 16, 16) -> (N, 10); every conv argument in use: 216 + 144 + 2,560 + 640 prunable weights."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, stride=2, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 4, 3, dilation=2, padding=2, padding_mode="circular", groups=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(256, 10, bias=False),
        nn.Linear(10, 64),
        nn.Linear(64, 10),
    )


class Reader(nn.Linear):
    """Has a forward of its own, in which the attribute is P(weight)."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.weight, self.bias)


class CalledAndRead(nn.Module):
    """(N, 3, 6, 6) -> (N, 4); convolution, linear, attention and a subclass that reads its weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(3, 8, 3)
        self.reader = Reader(8 * 16, 12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.linear = nn.Linear(12, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.reader(self.convolution(x).flatten(1)).unsqueeze(1)
        return self.linear(self.attention(x, x, x)[0].squeeze(1))


def prunable(model: nn.Module) -> list[nn.Parameter]:
    """Weights of the conv and linear layers, each once."""
    found = [m.weight for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    return list(dict.fromkeys(found))


def images(count: int = 8, pixels: int = 16) -> torch.Tensor:
    return torch.randn(count, 3, pixels, pixels, generator=torch.Generator().manual_seed(1))


def through_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def through_torch_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)
