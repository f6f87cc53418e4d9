"""Weights to measure on: the tensors of ResNet-50, two distributions, three sparsities."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from benchmarks.case import Setting

DISTRIBUTIONS = ("normal", "heavy-tailed")
SPARSITIES = (0.5, 0.9, 0.98)
# slow peers are measured on one input: what they do hardly depends on it
PEER_INPUT = ("heavy-tailed", 0.9)
GRID = tuple((distribution, sparsity) for distribution in DISTRIBUTIONS for sparsity in SPARSITIES)
SMOKE_GRID = (PEER_INPUT,)
SMOKE_SHAPES = ((16, 3, 3, 3), (32, 16, 3, 3), (64, 32, 1, 1), (10, 64))


def grid(setting: Setting) -> tuple[tuple[str, float], ...]:
    """The (distribution, sparsity) pairs to measure."""
    return SMOKE_GRID if setting.smoke else GRID


def resnet50_shapes() -> list[tuple[int, ...]]:
    """Shapes of the 54 prunable weights of torchvision's ResNet-50, 25,502,912 elements, in the model's order."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    width_in = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [(width, width_in, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                shapes.append((4 * width, width_in, 1, 1))
            width_in = 4 * width
    return [*shapes, (1000, 2048)]


@lru_cache(maxsize=2)
def make_weights(distribution: str, setting: Setting) -> tuple[Tensor, ...]:
    """Float32 weights with He's standard deviation per tensor; not to be written to.

    "normal" is a network at initialisation. "heavy-tailed" is normal times log-normal (sigma 0.75; kurtosis 28), as
    in trained networks: most weights are small, few are large.
    """
    generator = torch.Generator().manual_seed(DISTRIBUTIONS.index(distribution))
    weights = []
    for shape in SMOKE_SHAPES if setting.smoke else resnet50_shapes():
        weight = torch.randn(shape, generator=generator)
        if distribution == "heavy-tailed":
            weight *= (torch.randn(shape, generator=generator) * 0.75).exp_()
        weight *= math.sqrt(2 / math.prod(shape[1:]))
        weights.append(weight.to(setting.device))
    return tuple(weights)


@dataclass(frozen=True)
class Inputs:
    """Weights and their global threshold at a sparsity.

    Attributes:
        weights: float32.
        sparsity: the sparsity.
        rank: floor((N - 1) sparsity), (1,) int64 on the device.
        fraction: (N - 1) sparsity - rank.
        values: v[rank] and v[rank + 1] of the ascending magnitudes v, (1, 2) on the device.
        threshold: T between them, 0-dim on the device.
    """

    weights: tuple[Tensor, ...]
    sparsity: float
    rank: Tensor
    fraction: float
    values: Tensor
    threshold: Tensor

    @property
    def count(self) -> int:
        """N, the number of weights."""
        return sum(weight.numel() for weight in self.weights)

    @property
    def bytes(self) -> int:
        """Size of the weights."""
        return 4 * self.count


def make_inputs(setting: Setting, distribution: str, sparsity: float) -> Inputs:
    """The weights of a distribution with their threshold, found by sorting, with code that the package does not use."""
    weights = make_weights(distribution, setting)
    return with_threshold(weights, sorted_magnitudes(distribution, setting), sparsity)


def with_threshold(weights: tuple[Tensor, ...], ascending: np.ndarray, sparsity: float) -> Inputs:
    """``Inputs`` of weights whose magnitudes are sorted already, at least where the threshold is."""
    position = (ascending.size - 1) * sparsity
    rank = math.floor(position)
    low, high = ascending[rank], ascending[min(rank + 1, ascending.size - 1)]
    threshold = np.float32(low + (high - low) * np.float32(position - rank))
    threshold = low if threshold >= high else threshold
    device = weights[0].device
    return Inputs(
        weights,
        sparsity,
        torch.tensor([rank], device=device),
        position - rank,
        torch.tensor([[low, high]], device=device),
        torch.tensor(threshold, device=device),
    )


@lru_cache(maxsize=2)
def sorted_magnitudes(distribution: str, setting: Setting) -> np.ndarray:
    """All magnitudes of ``make_weights``, ascending."""
    return sort_magnitudes(make_weights(distribution, setting))


def sort_magnitudes(weights: tuple[Tensor, ...]) -> np.ndarray:
    """All magnitudes, ascending."""
    magnitudes = _magnitudes(weights)
    magnitudes.sort()
    return magnitudes


def partition_magnitudes(weights: tuple[Tensor, ...], sparsity: float) -> np.ndarray:
    """All magnitudes, in their sorted places where the threshold at this sparsity is; faster than sorting all."""
    magnitudes = _magnitudes(weights)
    rank = math.floor((magnitudes.size - 1) * sparsity)
    magnitudes.partition((rank, min(rank + 1, magnitudes.size - 1)))
    return magnitudes


def _magnitudes(weights: tuple[Tensor, ...]) -> np.ndarray:
    return np.concatenate([weight.abs().cpu().numpy().ravel() for weight in weights])
