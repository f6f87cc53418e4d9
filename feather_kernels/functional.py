"""The differentiable functions of the package.

Source of the method: Glentis Georgoulakis, Retsinas, Maragos, "Feather: An Elegant Solution to Effective DNN
Sparsification", BMVC 2023 (arXiv 2310.02448).
"""

from __future__ import annotations

import numbers
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from feather_kernels import autograd
from feather_kernels.checks import (
    check_constant,
    check_dtype,
    check_grad_scale,
    check_power,
    check_sparsity,
    check_tensor,
    check_threshold,
    check_weight,
    check_weights,
    threshold_fits,
    type_name,
)
from feather_kernels.dtypes import compute_dtype
from feather_kernels.quantile import interpolate, quantile_position

__all__ = ["magnitude_threshold", "sparse_conv1d", "sparse_conv2d", "sparse_conv3d", "sparse_linear", "threshold"]

ops = torch.ops.feather_kernels


def threshold(
    weight: Tensor,
    threshold: Tensor | float,
    power: float = 3.0,
    grad_scale: Tensor | float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """Feather's thresholding operator with a scaled straight-through gradient.

    Forward: ``P(w) = sign(w) (abs(w)^p - T^p)^(1/p)`` where kept and +0.0 where pruned; w is pruned iff ``T > 0`` and
    ``abs(w) <= T``. Backward: ``dL/dw = g`` where kept and ``grad_scale * g`` where pruned. ``T <= 0`` is the identity
    both ways, bit for bit. ``power`` 1 is soft, inf is hard thresholding. Twice differentiable (in g).

    Args:
        weight: any shape and strides; float16, bfloat16, float32 or float64.
        threshold: T; a float of at least 0, or a 0-dim tensor on the weight's device in float32 (float64 for float64
            weights) that does not require grad. A tensor may change between calls without a recompilation.
        power: p, at least 1 or ``math.inf``.
        grad_scale: theta of the paper, at least 0; a float, or a 0-dim tensor like ``threshold``. At the float 1.0 the
            backward pass launches nothing and saves nothing.
        out_dtype: dtype of the result, default the weight's (e.g. bfloat16 straight from float32 weights).

    Returns:
        The weight's shape, in ``out_dtype``; dense layouts such as channels_last are kept.

    Raises:
        ValueError, TypeError: an argument is outside of what is stated above; the message names it.
    """
    return autograd.threshold(*_operands(weight, threshold, power, grad_scale, out_dtype))


def sparse_linear(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | float,
    bias: Tensor | None = None,
    *,
    power: float = 3.0,
    grad_scale: Tensor | float = 1.0,
) -> Tensor:
    """``x P(w)^T + b``, where backward computes P(w) again: no copy of the weight lives in between.

    The gradient of w is that of ``threshold``. Under autocast x, P(w) and b are in its dtype. In torch.func transforms,
    forward-mode differentiation and tracers P(w) is kept after all.

    Args:
        x: (*, in).
        weight: w, (out, in); float16, bfloat16, float32 or float64.
        threshold: T, as in ``threshold``.
        bias: b, (out,), or None.
        power: p, as in ``threshold``.
        grad_scale: theta, as in ``threshold``.

    Returns:
        (*, out).

    Raises:
        ValueError, TypeError: as ``threshold`` and ``torch.nn.functional.linear``.

    Example:
        A layer of your own, under a threshold of your own::

            class SparseLinear(torch.nn.Linear):
                def forward(self, x):
                    t = fk.functional.magnitude_threshold(self.weight, sparsity=0.9)
                    return fk.functional.sparse_linear(x, self.weight, t, self.bias, grad_scale=0.5)
    """
    _check_tensors(x, weight, bias)
    dtype = autograd.autocast_dtype(weight)
    return autograd.lean_linear(x, _operands(weight, threshold, power, grad_scale, dtype), bias)


def sparse_conv1d(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | float,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    power: float = 3.0,
    grad_scale: Tensor | float = 1.0,
) -> Tensor:
    """``torch.nn.functional.conv1d`` with P(w); see ``sparse_conv2d``. x: (N, C, L) or (C, L)."""
    return _sparse_convolution(1, x, weight, threshold, bias, (stride, padding, dilation), groups, power, grad_scale)


def sparse_conv2d(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | float,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    power: float = 3.0,
    grad_scale: Tensor | float = 1.0,
) -> Tensor:
    """``torch.nn.functional.conv2d`` with P(w), where backward computes P(w) again: see ``sparse_linear``.

    Args:
        x: (N, C, H, W) or (C, H, W).
        weight: w, (out, C / groups, kH, kW).
        threshold: T, as in ``threshold``.
        bias: b, (out,), or None.
        stride: an integer, or one for each dimension.
        padding: zeros on both sides, an integer, or one for each dimension; not "same" or "valid".
        dilation: an integer, or one for each dimension.
        groups: blocked connections.
        power: p, as in ``threshold``.
        grad_scale: theta, as in ``threshold``.

    Returns:
        (N, out, H', W') or (out, H', W').

    Raises:
        ValueError, TypeError: as ``threshold``; also where stride, padding or dilation threshold_fits no dimension.

    Example::

        y = fk.functional.sparse_conv2d(images, layer.weight, t, layer.bias, stride=2, padding=1)
    """
    return _sparse_convolution(2, x, weight, threshold, bias, (stride, padding, dilation), groups, power, grad_scale)


def sparse_conv3d(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | float,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
    *,
    power: float = 3.0,
    grad_scale: Tensor | float = 1.0,
) -> Tensor:
    """``torch.nn.functional.conv3d`` with P(w); see ``sparse_conv2d``. x: (N, C, D, H, W) or (C, D, H, W)."""
    return _sparse_convolution(3, x, weight, threshold, bias, (stride, padding, dilation), groups, power, grad_scale)


def _sparse_convolution(
    dimensions: int,
    x: Tensor,
    weight: Tensor,
    threshold: Tensor | float,
    bias: Tensor | None,
    sizes: tuple[int | Sequence[int], ...],
    groups: int,
    power: float,
    grad_scale: Tensor | float,
) -> Tensor:
    _check_tensors(x, weight, bias)
    if weight.dim() != dimensions + 2:
        raise ValueError(f"weight must have {dimensions + 2} dimensions, got shape {tuple(weight.shape)}")
    if x.dim() not in (dimensions + 1, dimensions + 2):
        raise ValueError(f"x must have {dimensions + 1} or {dimensions + 2} dimensions, got shape {tuple(x.shape)}")
    each = []
    for name, size in zip(("stride", "padding", "dilation"), sizes, strict=True):
        numbers = list(size) if isinstance(size, tuple | list) else [size] * dimensions
        if not all(isinstance(number, int) for number in numbers):
            raise TypeError(f"{name} must be an integer or {dimensions} of them, got {size!r}")
        if len(numbers) != dimensions:
            raise ValueError(f"{name} must be an integer or {dimensions} of them, got {size!r}")
        each.append(numbers)
    operands = _operands(weight, threshold, power, grad_scale, autograd.autocast_dtype(weight))
    return autograd.lean_convolution(x, operands, bias, *each, False, [0] * dimensions, groups)


@torch.no_grad()
def magnitude_threshold(weights: Tensor | Sequence[Tensor], sparsity: float) -> Tensor:
    """Global magnitude threshold: the ``sparsity`` quantile of abs(w) over all weights together.

    With v the ascending sort of all N magnitudes and ``m = (N - 1) sparsity``, T is the linear interpolation between
    v[floor m] and v[ceil m], and v[floor m] where float rounding would reach v[ceil m]. So exactly
    ``floor(m) + 1`` weights, plus those tied with v[floor m] beyond that rank, are pruned. Sparsity 0 gives T = 0,
    which prunes nothing. The selection is exact, uses no sort and reads nothing on the host.

    Args:
        weights: one tensor, or tensors on one device; float64 only, or any mix of float16, bfloat16 and float32.
        sparsity: fraction of zeros wanted, in [0, 1).

    Returns:
        T, 0-dim, float32 (float64 for float64 weights), on the weights' device, not differentiable.

    Raises:
        ValueError: sparsity is outside [0, 1), or there is no weight at all.
        TypeError: an argument has another type, or a tensor another dtype.
    """
    check_sparsity("sparsity", sparsity)
    tensors = [weights] if isinstance(weights, Tensor) else _tensors(weights)
    count = sum(tensor.numel() for tensor in tensors)
    if count == 0:
        raise ValueError("weights must hold at least one element, got none")
    dtype = check_weights(tensors)
    if sparsity == 0:
        return tensors[0].new_zeros((), dtype=dtype)
    rank, fraction = quantile_position(count, sparsity)
    device = tensors[0].device
    values = ops.magnitude_select(tensors, [0] * len(tensors), torch.full((1,), rank, dtype=torch.int64, device=device))
    return interpolate(values[0], fraction)


def _tensors(weights: object) -> list[Tensor]:
    """Several weights as a list; raises TypeError unless they are a collection, or an iterator, of tensors."""
    if not isinstance(weights, Iterable) or isinstance(weights, Mapping | str):
        hint = ": pass its values()" if isinstance(weights, Mapping) else ""
        hint = ": pass its parameters()" if isinstance(weights, torch.nn.Module) else hint
        raise TypeError(f"weights must be a tensor or a sequence of tensors, got {type_name(weights)}{hint}")
    tensors = list(weights)
    for index, tensor in enumerate(tensors):
        check_tensor(f"weights[{index}]", tensor)
    return tensors


def _check_tensors(x: object, weight: object, bias: object) -> None:
    check_tensor("x", x)
    check_tensor("weight", weight)
    if bias is not None:
        check_tensor("bias", bias)


def _operands(
    weight: Tensor,
    threshold: Tensor | float,
    power: float,
    grad_scale: Tensor | float,
    dtype: torch.dtype | None,
) -> autograd.SparseWeight:
    """What P(w) is computed from, as the ops take it: grad_scale is None for the float 1. Checks all arguments."""
    check_tensor("weight", weight)
    if not (isinstance(threshold, Tensor) and threshold_fits(weight, threshold)):
        check_weight("weight", weight)
        threshold = _scalar("threshold", threshold, weight)
    if dtype is not None:
        check_dtype("out_dtype", dtype)
    check_constant("threshold", threshold)
    check_power(power)
    scale: Tensor | None = None
    if isinstance(grad_scale, Tensor):
        check_constant("grad_scale", grad_scale)
        scale = _scalar("grad_scale", grad_scale, weight)
    elif type(grad_scale) is not float or grad_scale != 1:
        check_grad_scale(grad_scale)
        scale = None if grad_scale == 1 else _scalar("grad_scale", grad_scale, weight)
    return autograd.SparseWeight(weight, threshold, scale, float(power), dtype)


def _scalar(name: str, value: Tensor | float, weight: Tensor) -> Tensor:
    if isinstance(value, Tensor):
        check_threshold(name, value, weight)
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float, numbers.Real)):
        raise TypeError(f"{name} must be a number or a 0-dim tensor, got {type_name(value)}")
    if not value >= 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return torch.full((), value, dtype=compute_dtype(weight.dtype), device=weight.device)
