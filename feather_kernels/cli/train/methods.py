"""The methods of sparse training, all on the same kernels."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor, nn

from feather_kernels.sparsify import ConstantSchedule, Report, Sparsifier


@dataclass(frozen=True)
class Method:
    """How a method thresholds weights; all have one global threshold and the cubic schedule.

    Attributes:
        power: p of the thresholding operator.
        grad_scale: the factor on the gradient of pruned weights; "auto" is the paper's theta.
        holds_pruned: whether a step leaves the weights unchanged that its forward pass pruned.
        prunes: whether it prunes at all.
    """

    power: float = 3.0
    grad_scale: float | str = 1.0
    holds_pruned: bool = False
    prunes: bool = True


METHODS = {
    "feather": Method(grad_scale="auto"),  # Glentis Georgoulakis et al. 2023
    "hard": Method(power=inf),  # hard thresholding with the straight-through gradient
    "soft": Method(power=1.0),  # soft thresholding with the straight-through gradient
    "gmp": Method(power=inf, grad_scale=0.0, holds_pruned=True),  # gradual magnitude pruning, Zhu & Gupta 2017
    "dense": Method(prunes=False),
}
DEFAULT_METHOD = "feather"


@contextmanager
def hold_pruned(sparsifier: Sparsifier) -> Iterator[None]:
    """A context for ``optimizer.step()`` in which the weights that the forward pass pruned keep their values.

    Zhu & Gupta 2017, section 3: "the weights that were masked in the forward execution do not get updated in the
    back-propagation step". A gradient scale of 0 alone does not do that, because weight decay and momentum still
    move them. They are kept, not zeroed: one comes back when others have become smaller.
    """
    weights = [weight.parameter for weight in sparsifier.weights]
    pruned = [_pruned(parameter, sparsifier.threshold) for parameter in weights]
    before = [parameter.detach().clone() for parameter in weights]
    yield
    with torch.no_grad():
        for parameter, mask, value in zip(weights, pruned, before, strict=True):
            parameter.copy_(torch.where(mask, value, parameter))


def dense_report(model: nn.Module) -> Report:
    """The report of a model without a sparsifier: its layers and the zeros that they happen to have."""
    sparsifier = Sparsifier(model, schedule=ConstantSchedule(0.0))
    sparsifier.detach()
    return sparsifier.report()


def _pruned(weight: Tensor, threshold: Tensor) -> Tensor:
    """Where |w| <= T, the predicate of the kernels; nowhere if T = 0."""
    return (weight.detach().abs() <= threshold) & (threshold > 0)
