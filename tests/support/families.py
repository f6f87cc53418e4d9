"""A small model and an input for every family of layers: the rows of the test matrix (layers/test_matrix.py)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class MyLinear(nn.Linear):
    """A subclass that keeps torch's forward."""


class ScaledConv(nn.Conv2d):
    """A subclass whose own forward reads the weight."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * 0.5, self.bias, padding=1)


class NormedConv(nn.Conv2d):
    """Reads its weight first without a graph, then with one."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            norm = self.weight.norm()
        return F.conv2d(x, self.weight / norm, self.bias)


class ScaledLSTM(nn.LSTM):
    """A recurrent subclass with a forward around torch's."""

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        return super().forward(2 * x, state)


class FirstOutput(nn.Module):
    """Modules that return tuples, called on one tensor."""

    def __init__(self, module: nn.Module, copies: int = 1) -> None:
        super().__init__()
        self.module = module
        self.copies = copies

    def forward(self, x: Tensor) -> Tensor:
        return self.module(*[x] * self.copies)[0]


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x, x)


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x).relu())


class Reader(nn.Module):
    """Reads the weight of its child without calling it."""

    def __init__(self) -> None:
        super().__init__()
        self.projection = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.projection.weight, self.projection.bias)


class BilinearOfOne(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.bilinear = nn.Bilinear(8, 8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.bilinear(x, x)


@dataclass(frozen=True)
class Family:
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    options: dict[str, object] = field(default_factory=dict)  # of the Sparsifier
    recomputes: bool = True  # backward computes P(weight) again, in some layer at least
    compiles: bool = True

    def model(self) -> nn.Module:
        torch.manual_seed(0)
        return self.make()

    def input(self) -> Tensor:
        return torch.randn(self.shape, generator=torch.Generator().manual_seed(1))


IMAGE = (2, 4, 6, 6)
SEQUENCE = (3, 5, 8)
FAMILIES: dict[str, Family] = {
    "Linear": Family(lambda: nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 3, bias=False)), (5, 8)),
    "Conv1d": Family(lambda: nn.Conv1d(4, 6, 3, padding="same", dilation=2), (2, 4, 9)),
    "Conv2d": Family(lambda: nn.Conv2d(4, 6, (3, 2), 2, padding=1, groups=2, padding_mode="reflect"), IMAGE),
    "Conv2d same": Family(lambda: nn.Conv2d(4, 6, (3, 2), padding="same"), IMAGE),
    "Conv3d": Family(lambda: nn.Conv3d(2, 3, 3, padding=1), (1, 2, 4, 5, 4)),
    "ConvTranspose1d": Family(lambda: nn.ConvTranspose1d(4, 3, 3, 2, output_padding=1), (2, 4, 7)),
    "ConvTranspose2d": Family(lambda: nn.ConvTranspose2d(4, 6, 3, 2, padding=1, groups=2, dilation=2), IMAGE),
    "ConvTranspose3d": Family(lambda: nn.ConvTranspose3d(2, 3, 2, bias=False), (1, 2, 3, 4, 3)),
    "MultiheadAttention": Family(
        lambda: FirstOutput(nn.MultiheadAttention(8, 2, batch_first=True), 3), SEQUENCE, recomputes=False
    ),
    "MultiheadAttention kdim": Family(
        lambda: FirstOutput(nn.MultiheadAttention(8, 2, kdim=8, vdim=8, batch_first=True, bias=False), 3),
        SEQUENCE,
        recomputes=False,
    ),
    "TransformerEncoderLayer": Family(
        lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), SEQUENCE, recomputes=False
    ),
    "TransformerDecoderLayer": Family(Decoder, SEQUENCE),  # its two linear layers recompute, attention keeps
    "LSTM": Family(
        lambda: FirstOutput(nn.LSTM(8, 6, 2, bidirectional=True, proj_size=4)),
        SEQUENCE,
        recomputes=False,
        compiles=False,
    ),
    "GRU": Family(lambda: FirstOutput(nn.GRU(8, 6, batch_first=True)), SEQUENCE, recomputes=False, compiles=False),
    "RNN": Family(lambda: FirstOutput(nn.RNN(8, 6)), SEQUENCE, recomputes=False, compiles=False),
    "subclass": Family(lambda: MyLinear(8, 6), (5, 8)),
    "subclass with forward": Family(lambda: ScaledConv(4, 6, 3), IMAGE, recomputes=False),
    "subclass reading without grad": Family(lambda: NormedConv(4, 6, 3), IMAGE, recomputes=False),
    "LSTM subclass": Family(lambda: FirstOutput(ScaledLSTM(8, 6)), SEQUENCE, recomputes=False, compiles=False),
    "reader": Family(Reader, (5, 8), {"read_directly": ["projection"]}, recomputes=False),
    "tied": Family(Tied, (5, 8)),
    "Bilinear, by name": Family(BilinearOfOne, (5, 8), {"targets": [nn.Bilinear]}, recomputes=False),
}
