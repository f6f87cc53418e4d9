"""Whole networks to measure, and what a sparse one must compute: a dense one that holds P(w)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from benchmarks import gates
from benchmarks.case import Setting
from benchmarks.inputs import partition_magnitudes, with_threshold
from feather_kernels.cli.train.models import make_model

POWER = 3.0


@dataclass(frozen=True)
class Network:
    """A model that classifies images, and its batches.

    Attributes:
        title: how results name it.
        make: makes the model, the same weights in every call.
        batch, size: batches are (batch, 3, size, size).
        classes: number of outputs.
        sparsity: fraction of zeros to measure it at.
    """

    title: str
    make: Callable[[], nn.Module]
    batch: int
    size: int
    classes: int = 1000
    sparsity: float = 0.9

    def inputs(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """A random batch: images (batch, 3, size, size) and labels (batch,)."""
        generator = torch.Generator().manual_seed(3)
        images = torch.randn(self.batch, 3, self.size, self.size, generator=generator)
        labels = torch.randint(self.classes, (self.batch,), generator=generator)
        return images.to(device), labels.to(device)


def from_torchvision(name: str) -> nn.Module:
    """A model of torchvision's, freshly initialised."""
    from torchvision import models  # an extra; only whole networks need it

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return models.get_model(name)


class CheckpointedTransformer(nn.Module):
    """Transformer encoder layers over patches of 8 x 8 pixels; backward computes the activations of each layer again.

    Args:
        width: of the layers; their feed-forward part is 4 times as wide.
        layers: number of layers.
        classes: number of outputs.
    """

    def __init__(self, width: int, layers: int, classes: int) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 8, stride=8)
        heads, inner = max(1, width // 64), 4 * width
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, heads, inner, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )
        self.classifier = nn.Linear(width, classes)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, classes)."""
        tokens = self.patches(images).flatten(2).transpose(1, 2)
        for layer in self.layers:
            tokens = checkpoint(layer, tokens, use_reentrant=False)
        return self.classifier(tokens.mean(1))


def checkpointed_transformer(width: int, layers: int, classes: int) -> nn.Module:
    """A ``CheckpointedTransformer``, freshly initialised."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return CheckpointedTransformer(width, layers, classes)


resnet50 = partial(from_torchvision, "resnet50")
RESNET50_224 = Network("ResNet-50, 224 px, batch 8", resnet50, 8, 224)
RESNET50_128 = Network("ResNet-50, 128 px, batch 8", resnet50, 8, 128)
RESNET20 = Network("ResNet-20, 32 px, batch 128", partial(make_model, "resnet20", 3, 100, 0), 128, 32, classes=100)
# small batches, so that weights count most
FOR_MEMORY = (
    Network("ResNet-50", resnet50, 2, 64),
    Network("ViT-B/16", partial(from_torchvision, "vit_b_16"), 1, 224),
    Network("checkpointed transformer", partial(checkpointed_transformer, 512, 6, 1000), 2, 64),
)
SMOKE = Network("CNN, 8 px, batch 2", partial(make_model, "cnn", 3, 10, 0), 2, 8, classes=10, sparsity=0.5)
SMOKE_TRANSFORMER = Network(
    "transformer, 16 px, batch 2", partial(checkpointed_transformer, 32, 2, 10), 2, 16, classes=10, sparsity=0.5
)


def sizes(setting: Setting, *networks: Network) -> tuple[Network, ...]:
    """``networks``, or a tiny one for a smoke run."""
    return (SMOKE,) if setting.smoke else networks


def prunable(model: nn.Module) -> list[Tensor]:
    """Weights of convolutions, linear and attention layers, in the model's order."""
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear | nn.MultiheadAttention)]
    return [parameter for layer in layers for parameter in layer.parameters(recurse=False) if parameter.dim() > 1]


@torch.no_grad()
def write_thresholded(model: nn.Module, sparsity: float, power: float = POWER) -> list[Tensor]:
    """Write P(w) into the prunable weights of a dense model; returns where each is pruned. By code of its own."""
    weights = prunable(model)
    in_float32 = tuple(weight.detach().float() for weight in weights)
    t = with_threshold(in_float32, partition_magnitudes(in_float32, sparsity), sparsity).threshold
    pruned = [weight.abs() <= t for weight in in_float32]
    for weight, zero in zip(weights, pruned, strict=True):
        weight.copy_(torch.where(zero, 0.0, gates.thresholded(weight.double(), t.double(), power)))
    return pruned
