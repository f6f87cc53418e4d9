"""Training beside an independent implementation of the method, compared at every step from the identical state.

Thresholds, masks, counts and gradients must be equal, P(w) within ulps. Then the state advances by our own update:
two float32 trajectories that run freely diverge chaotically.
"""

from __future__ import annotations

import copy
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import feather_kernels as fk

SPARSITY, GRAD_SCALE = 0.9, 0.5


class Agreement(NamedTuple):
    """What a training showed: ulps of P(w) at most, pruned weights at most, weights, and the loss at the end."""

    largest_error: float
    zeros: int
    weights: int
    loss: float


def scheduled_sparsity(step: int, total: int) -> float:
    """The cubic schedule of the Feather paper: from step 0 to half of the training."""
    end = total // 2
    return SPARSITY if step >= end else SPARSITY * (1 - (1 - step / end) ** 3)


def sorted_threshold(weights: list[Tensor], sparsity: float) -> Tensor:
    """Linear-interpolation quantile of all magnitudes by sorting."""
    if sparsity == 0:
        return torch.zeros(())
    v = torch.cat([w.detach().abs().flatten() for w in weights]).sort().values
    m = (len(v) - 1) * sparsity
    low, high = v[math.floor(m)], v[math.ceil(m)]
    t = low + (high - low) * (m - math.floor(m))
    return low if t >= high > low else t


def paper_formula(w: Tensor, t: Tensor) -> Tensor:
    """sign(w) (|w|^3 - T^3)^(1/3), in float64."""
    w, t = w.double(), t.double()
    difference = w.abs() ** 3 - t**3
    kept = (w.abs() > t) | (t <= 0)
    return torch.where(kept, w.sign() * difference.clamp_min(0) ** (1 / 3), 0)


def train_beside_teacher(
    model: nn.Module, images: Tensor, labels: Tensor, steps: int, batch_size: int, rate: float = 0.02, **options: Any
) -> Agreement:
    """Train ``model`` with a Sparsifier; raises AssertionError at the first step that differs."""
    dense = copy.deepcopy(model)
    sparsifier = fk.Sparsifier(model, sparsity=SPARSITY, total_steps=steps, grad_scale=GRAD_SCALE, **options)
    layers = [m for m in model.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    dense_layers = [m for m in dense.modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    largest_error, seen_zeros = 0.0, 0
    for step in range(steps):
        t = sorted_threshold([layer.weight for layer in layers], scheduled_sparsity(step, steps))
        assert sparsifier.threshold.equal(t), f"step {step}"

        dense.load_state_dict(copy.deepcopy(model.state_dict()))
        masks = []
        for layer, dense_layer in zip(layers, dense_layers, strict=True):
            expected = paper_formula(layer.weight.detach(), t)
            actual = layer.sparse_weight().detach()
            masks.append((layer.weight.detach().abs() > t) | (t <= 0))
            assert actual.ne(0).equal(masks[-1]), f"step {step}"
            # float64 cancels near T: its own error there is eps64 (a / (a - T)) of the value, far below a float32 ulp
            error = (actual.double() - expected).abs() / torch.finfo(torch.float32).eps
            largest_error = max(largest_error, float((error / expected.abs().clamp_min(1e-30)).max()))
            with torch.no_grad():
                dense_layer.weight.copy_(actual)
        pruned = sum(int((~mask).sum()) for mask in masks)
        seen_zeros = max(seen_zeros, pruned)
        assert sparsifier.report().zeros == pruned

        batch = torch.randint(0, len(images), (batch_size,))
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        dense_loss = F.cross_entropy(dense(images[batch]), labels[batch])
        assert loss.equal(dense_loss)
        loss.backward()
        dense_loss.backward()
        for (name, p), q in zip(model.named_parameters(), dense.parameters(), strict=True):
            prunable = next((i for i, layer in enumerate(layers) if layer.weight is p), None)
            expected = q.grad if prunable is None else torch.where(masks[prunable], q.grad, q.grad * GRAD_SCALE)
            assert p.grad.equal(expected), f"step {step}: {name}"
        dense.zero_grad()
        optimizer.step()
        optimizer.zero_grad()
        sparsifier.step()
    return Agreement(largest_error, seen_zeros, sum(layer.weight.numel() for layer in layers), loss.item())
