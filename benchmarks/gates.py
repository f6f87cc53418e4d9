"""Correctness gates: what a result must be before its variant is timed.

``exact`` gates hold the package to its contract: the mask exact, values within 2 ulp (0.55 ulp in 16-bit dtypes). The
others let a peer have the faults of its formula near T, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from feather_kernels.cli.selftest.oracle import ulp

ALLOWED_ULP = {torch.float32: 2.0, torch.bfloat16: 0.55, torch.float16: 0.55}
SAMPLED = 50_000  # elements of each tensor whose values are compared; masks are compared everywhere
BAND = 1e-5  # relative distance from T within which a peer's mask may differ


def check_thresholded(
    outputs: Sequence[Tensor], weights: Sequence[Tensor], t: Tensor, power: float, exact: bool = True
) -> str | None:
    """Whether the outputs are P(w) of the weights."""
    if len(outputs) != len(weights):
        return f"{len(outputs)} outputs for {len(weights)} weights"
    for index, (output, weight) in enumerate(zip(outputs, weights, strict=True)):
        wrong = check_mask(output.reshape(weight.shape) == 0, weight, t, exact)
        if wrong is None:
            step = max(1, weight.numel() // SAMPLED)
            flat, values = weight.reshape(-1)[::step].double(), output.reshape(-1)[::step]
            wrong = _check_values(values, flat, t.double(), power, exact)
        if wrong is not None:
            return f"tensor {index}: {wrong}"
    return None


def check_mask(pruned: Tensor, weight: Tensor, t: Tensor, exact: bool) -> str | None:
    """Whether ``pruned`` is where ``abs(w) <= T``; if not exact, beyond a band around T."""
    count = _count_wrong(pruned != (weight.abs() <= t), weight, t, exact)
    return f"{count} of {weight.numel()} elements are on the wrong side of T" if count else None


def _count_wrong(differs: Tensor, weight: Tensor, t: Tensor, exact: bool) -> int:
    if not exact:
        differs = differs & ((weight.abs() - t).abs() > BAND * t)
    return int(differs.sum())


def _check_values(values: Tensor, weight: Tensor, t: Tensor, power: float, exact: bool) -> str | None:
    """Error of the values that are kept; all but ``values`` in float64."""
    kept = weight.abs() > t
    weight, error, dtype = weight[kept], values[kept].double(), values.dtype
    expected = thresholded(weight, t, power)
    error = (error - expected).abs()
    if not error.numel():
        return None
    if exact:
        worst = float((error / ulp(expected, dtype)).max())
        return None if worst <= ALLOWED_ULP[dtype] else f"error of {worst:.3g} ulp"
    relative = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    worst = float((error / (relative * weight.abs() + 1e-2 * t)).max())
    return None if worst <= 1 else f"error of {worst:.3g} times what the formula's cancellation explains"


def thresholded(weight: Tensor, t: Tensor, power: float) -> Tensor:
    """``sign(w) (abs(w)^p - T^p)^(1/p)`` for abs(w) > T, in float64, in a form that does not cancel near T."""
    a = weight.abs()
    if power == math.inf:
        value = a
    elif power == 1:
        value = a - t
    elif power == 2:
        value = ((a - t) * (a + t)).sqrt()
    else:
        value = ((a - t) * (a * (a + t) + t * t)).pow(1 / 3)
    return torch.copysign(value, weight)


def check_scaled(
    outputs: Sequence[Tensor],
    gradients: Sequence[Tensor],
    weights: Sequence[Tensor],
    t: Tensor,
    grad_scale: float,
    exact: bool = True,
) -> str | None:
    """Whether the outputs are ``g * (1 where kept, grad_scale where pruned)``, exactly; grad_scale a power of two.

    In the weights' dtype; if not exact, beyond a band around T.
    """
    for index, (output, gradient, weight) in enumerate(zip(outputs, gradients, weights, strict=True)):
        if output.dtype != weight.dtype:
            return f"tensor {index}: the scaled gradient is {output.dtype}"
        gradient = gradient.to(weight.dtype)
        expected = torch.where(weight.abs() <= t, gradient * grad_scale, gradient)
        count = _count_wrong(output.reshape(weight.shape) != expected, weight, t, exact)
        if count:
            return f"tensor {index}: {count} of {weight.numel()} gradients are wrong"
    return None


def check_values(values: Tensor, expected: Tensor, count: int = 2) -> str | None:
    """Whether the first ``count`` order statistics have the expected bits."""
    got, wanted = values.reshape(-1)[:count], expected.reshape(-1)[:count]
    return None if torch.equal(got, wanted) else f"order statistics {got.tolist()}, sorted {wanted.tolist()}"
