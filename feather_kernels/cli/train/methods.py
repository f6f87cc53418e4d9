"""The methods of sparse training that a recipe can use, all on the same kernels."""

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
    """How weights are thresholded, all under one global threshold and the cubic schedule.

    Attributes:
        about: one line for the help text.
        power: p of the thresholding operator.
        grad_scale: factor of the gradient on pruned weights; "auto" is the paper's theta.
        holds_pruned: a weight that was pruned in the forward pass is not updated in that step, by nothing.
        prunes: whether there is a threshold at all.
    """

    about: str
    power: float = 3.0
    grad_scale: float | str = 1.0
    holds_pruned: bool = False
    prunes: bool = True


METHODS = {
    "feather": Method("p = 3, theta auto (Glentis Georgoulakis et al. 2023)", grad_scale="auto"),
    "hard": Method("hard thresholds, straight-through gradient", power=inf),
    "soft": Method("soft thresholds, straight-through gradient", power=1.0),
    "gmp": Method("gradual magnitude pruning (Zhu & Gupta 2017)", power=inf, grad_scale=0.0, holds_pruned=True),
    "dense": Method("no pruning", prunes=False),
}
DEFAULT_METHOD = "feather"


@contextmanager
def hold_pruned(sparsifier: Sparsifier) -> Iterator[None]:
    """Around ``optimizer.step()``: weights that the forward pass pruned keep their values.

    Zhu & Gupta 2017, section 3: "the weights that were masked in the forward execution do not get updated in the
    back-propagation step". A gradient scale of 0 alone leaves them to weight decay and to momentum. They are kept, not
    zeroed: one comes back when others have become smaller.
    """
    weights = [weight.parameter for weight in sparsifier.weights]
    pruned = [_pruned(parameter, sparsifier.threshold) for parameter in weights]
    before = [parameter.detach().clone() for parameter in weights]
    yield
    with torch.no_grad():
        for parameter, mask, value in zip(weights, pruned, before, strict=True):
            parameter.copy_(torch.where(mask, value, parameter))


def dense_report(model: nn.Module) -> Report:
    """The report of a model that no sparsifier has touched: its layers and their zeros, if any."""
    sparsifier = Sparsifier(model, schedule=ConstantSchedule(0.0))
    sparsifier.detach()
    return sparsifier.report()


def _pruned(weight: Tensor, threshold: Tensor) -> Tensor:
    """|w| <= T, the predicate of the kernels; nothing at T = 0."""
    return (weight.detach().abs() <= threshold) & (threshold > 0)
