"""A model of tiny linear layers, whose time is what each layer costs the host."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from feather_kernels.sparsify import ConstantSchedule, Sparsifier

WIDTH, BATCH = 8, 4
SPARSITY, POWER = 0.5, 3.0


class Layers(NamedTuple):
    """A model of linear layers, dense or sparse, and a function that runs it forward and backward."""

    model: nn.Module
    sparsifier: Sparsifier | None
    both: Callable[[], Tensor]


def make_layers(count: int, device: torch.device, grad_scale: float | None, compiler: str | None) -> Layers:
    """Make linear layers without bias, each followed by a tanh, with the same weights in every call.

    Args:
        count: the number of layers.
        device: where to put them.
        grad_scale: of the sparsifier; None for dense layers.
        compiler: the backend of torch.compile; None for eager mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        parts = [part for _ in range(count) for part in (nn.Linear(WIDTH, WIDTH, bias=False), nn.Tanh())]
        x = torch.randn(BATCH, WIDTH, dtype=torch.float32, device="cpu").to(device).requires_grad_()
    model, sparsifier = nn.Sequential(*parts).to(device), None
    gradient = torch.ones(BATCH, WIDTH, dtype=torch.float32, device=device)
    if grad_scale is not None:
        sparsifier = Sparsifier(model, schedule=ConstantSchedule(SPARSITY), power=POWER, grad_scale=grad_scale)
    run = model if compiler is None else torch.compile(model, fullgraph=True, backend=compiler)

    def both() -> Tensor:
        x.grad = None
        for parameter in model.parameters():
            parameter.grad = None
        y: Tensor = run(x)
        y.backward(gradient)
        return y

    both()
    if sparsifier is not None:
        sparsifier.step()
        both()
    return Layers(model, sparsifier, both)
