"""A model that shards unevenly, its batches, and what one process makes of its weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import feather_kernels as fk

PRUNABLE = (7 * 9, 21 * 252, 3 * 21, 5 * 3)


def make_model() -> nn.Sequential:
    """Layers whose first dimension no number of processes divides, or is smaller than it: some have empty shards."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 7, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Sequential(nn.Linear(7 * 36, 21), nn.ReLU(), nn.Linear(21, 3)),
        nn.Linear(3, 5),
    )


def shard(model: nn.Sequential, **how: Any) -> None:
    """A group for a block, one for a layer, and the root's for the convolution."""
    from torch.distributed.fsdp import fully_shard

    fully_shard(model[3], **how)
    fully_shard(model[4], **how)
    fully_shard(model, **how)


def batch(step: int, part: int = 0, parts: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x, y = torch.randn(8, 1, 8, 8, generator=generator), torch.randint(0, 5, (8,), generator=generator)
    return x.chunk(parts)[part], y.chunk(parts)[part]


def own_batch(step: int) -> tuple[Tensor, Tensor]:
    import torch.distributed as dist

    return batch(step, dist.get_rank(), dist.get_world_size())


def optimizer_of(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, xy: tuple[Tensor, Tensor]) -> Tensor:
    loss = F.cross_entropy(model(xy[0]).float(), xy[1])
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss


def prunable(model: nn.Module) -> list[Any]:
    layers = [module for module in model.modules() if isinstance(module, (nn.Linear, nn.Conv2d))]
    return [module._parameters["weight"] for module in layers]


def gathered(model: nn.Module) -> list[Tensor]:
    """Copies of the whole weights."""
    return [(w.full_tensor() if hasattr(w, "full_tensor") else w).detach().clone() for w in prunable(model)]


def alone(weights: list[Tensor], sparsity: float, **options: Any) -> fk.Sparsifier:
    """The sparsifier of one process at these weights."""
    model = make_model()
    with torch.no_grad():
        for own, weight in zip(prunable(model), weights, strict=True):
            own.copy_(weight)
    return fk.Sparsifier(model, schedule=fk.ConstantSchedule(sparsity), **options)


def zeros_in(weights: list[Tensor]) -> int:
    return sum(int((w == 0).sum()) for w in weights)
