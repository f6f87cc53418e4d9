"""The differentiable functions of the package: the thresholding operator, and layers that compute with it.

The method is that of Glentis Georgoulakis, Retsinas, Maragos, "Feather: An Elegant Solution to Effective DNN
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

    A weight is pruned iff ``T > 0`` and ``abs(w) <= T``. Forward computes ``P(w) = sign(w) (abs(w)^p - T^p)^(1/p)``
    where w is kept and +0.0 where it is pruned. Backward computes ``dL/dw = g`` where w is kept and ``grad_scale * g``
    where it is pruned. If ``T <= 0``, both are the identity, bit for bit. The gradient is differentiable in g.

    Args:
        weight: w, of any shape and strides; float16, bfloat16, float32 or float64.
        threshold: T; a float of at least 0, or a 0-dim tensor on the weight's device in float32 (float64 for float64
            weights) that does not require grad. A tensor may change between calls without a recompilation.
        power: p, at least 1; 1 is soft thresholding, ``math.inf`` hard thresholding.
        grad_scale: theta of the paper, at least 0; a float, or a 0-dim tensor like ``threshold``. For the float 1.0 the
            backward pass launches nothing and saves nothing.
        out_dtype: dtype of the result, by default the weight's; e.g. bfloat16 straight from float32 weights.

    Returns:
        P(w) in the weight's shape; dense layouts such as channels_last are kept.

    Raises:
        ValueError: an argument has a value, shape or device other than stated above; the message names it.
        TypeError: an argument has another type or dtype.

    Example:
        >>> w = torch.tensor([0.1, -0.5, 2.0], requires_grad=True)
        >>> y = fk.functional.threshold(w, threshold=0.5, power=1, grad_scale=0.25)
        >>> y
        tensor([0.0000, 0.0000, 1.5000], grad_fn=<PlainThresholdBackward>)
        >>> y.sum().backward()
        >>> w.grad
        tensor([0.2500, 0.2500, 1.0000])
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
    """Compute ``x P(w)^T + b``; backward computes P(w) again, so that it is not kept in between.

    The gradient of w is that of ``threshold``. Under autocast, x, P(w) and b are cast to its dtype. P(w) is kept after
    all inside torch.func transforms, forward-mode differentiation and tracers, and for nested or sparse x.

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
        ValueError: as ``threshold``.
        TypeError: as ``threshold``.
        RuntimeError: as ``torch.nn.functional.linear``, if the shapes do not match.

    Example:
        >>> class SparseLinear(nn.Linear):
        ...     def forward(self, x):
        ...         t = fk.functional.magnitude_threshold(self.weight, sparsity=0.9)
        ...         return fk.functional.sparse_linear(x, self.weight, t, self.bias, grad_scale=0.5)
        >>> SparseLinear(16, 4)(torch.randn(8, 16)).shape
        torch.Size([8, 4])
    """
    _check_tensors(x, weight, bias)
    dtype = autograd.autocast_dtype(weight)
    return autograd.recomputing_linear(x, _operands(weight, threshold, power, grad_scale, dtype), bias)


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
    """Compute ``torch.nn.functional.conv1d`` with P(w) as the weight; backward computes P(w) again.

    Under autocast, x, P(w) and b are cast to its dtype. ``sparse_linear`` says where P(w) is kept after all.

    Args:
        x: (N, C, L) or (C, L).
        weight: w, (out, C / groups, k); float16, bfloat16, float32 or float64.
        threshold: T, as in ``threshold``.
        bias: b, (out,), or None.
        stride: an integer, or a sequence of one.
        padding: zeros on both sides, an integer, or one for each dimension; not "same" or "valid".
        dilation: an integer, or one for each dimension.
        groups: number of blocks of channels that are connected only among themselves.
        power: p, as in ``threshold``.
        grad_scale: theta, as in ``threshold``.

    Returns:
        (N, out, L') or (out, L').

    Raises:
        ValueError: as ``threshold``; or x, weight, stride, padding or dilation has another number of dimensions.
        TypeError: as ``threshold``; or stride, padding or dilation is not made of integers.

    Example:
        >>> x, weight = torch.randn(8, 3, 50), torch.randn(16, 3, 5)
        >>> fk.functional.sparse_conv1d(x, weight, threshold=1.0, padding=2).shape
        torch.Size([8, 16, 50])
    """
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
    """Compute ``torch.nn.functional.conv2d`` with P(w) as the weight; backward computes P(w) again.

    Under autocast, x, P(w) and b are cast to its dtype. ``sparse_linear`` says where P(w) is kept after all.

    Args:
        x: (N, C, H, W) or (C, H, W).
        weight: w, (out, C / groups, kH, kW); float16, bfloat16, float32 or float64.
        threshold: T, as in ``threshold``.
        bias: b, (out,), or None.
        stride: an integer, or one for each of the 2 dimensions.
        padding: zeros on both sides, an integer, or one for each dimension; not "same" or "valid".
        dilation: an integer, or one for each dimension.
        groups: number of blocks of channels that are connected only among themselves.
        power: p, as in ``threshold``.
        grad_scale: theta, as in ``threshold``.

    Returns:
        (N, out, H', W') or (out, H', W').

    Raises:
        ValueError: as ``threshold``; or x, weight, stride, padding or dilation has another number of dimensions.
        TypeError: as ``threshold``; or stride, padding or dilation is not made of integers.

    Example:
        >>> images, weight = torch.randn(8, 3, 32, 32), torch.randn(16, 3, 3, 3)
        >>> t = fk.functional.magnitude_threshold(weight, sparsity=0.9)
        >>> fk.functional.sparse_conv2d(images, weight, t, stride=2, padding=1).shape
        torch.Size([8, 16, 16, 16])
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
    """Compute ``torch.nn.functional.conv3d`` with P(w) as the weight; backward computes P(w) again.

    Under autocast, x, P(w) and b are cast to its dtype. ``sparse_linear`` says where P(w) is kept after all.

    Args:
        x: (N, C, D, H, W) or (C, D, H, W).
        weight: w, (out, C / groups, kD, kH, kW); float16, bfloat16, float32 or float64.
        threshold: T, as in ``threshold``.
        bias: b, (out,), or None.
        stride: an integer, or one for each of the 3 dimensions.
        padding: zeros on both sides, an integer, or one for each dimension; not "same" or "valid".
        dilation: an integer, or one for each dimension.
        groups: number of blocks of channels that are connected only among themselves.
        power: p, as in ``threshold``.
        grad_scale: theta, as in ``threshold``.

    Returns:
        (N, out, D', H', W') or (out, D', H', W').

    Raises:
        ValueError: as ``threshold``; or x, weight, stride, padding or dilation has another number of dimensions.
        TypeError: as ``threshold``; or stride, padding or dilation is not made of integers.

    Example:
        >>> volumes, weight = torch.randn(2, 1, 8, 16, 16), torch.randn(4, 1, 3, 3, 3)
        >>> fk.functional.sparse_conv3d(volumes, weight, threshold=1.0, padding=1).shape
        torch.Size([2, 4, 8, 16, 16])
    """
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
    return autograd.recomputing_convolution(x, operands, bias, *each, False, [0] * dimensions, groups)


@torch.no_grad()
def magnitude_threshold(weights: Tensor | Sequence[Tensor], sparsity: float) -> Tensor:
    """Select the threshold that prunes a fraction of all weights together: the ``sparsity`` quantile of abs(w).

    With v the ascending sort of all N magnitudes and ``m = (N - 1) sparsity``, T is the linear interpolation between
    v[floor m] and v[ceil m], or v[floor m] where rounding would give v[ceil m]. So it prunes exactly ``floor(m) + 1``
    weights, and those beyond that rank which are tied with v[floor m]. Sparsity 0 gives T = 0, which prunes nothing.
    The selection is exact, sorts nothing and reads nothing on the host.

    Args:
        weights: one tensor, or a sequence or iterator of tensors on one device; all in float64, or in any mix of
            float16, bfloat16 and float32.
        sparsity: wanted fraction of zeros, in [0, 1).

    Returns:
        T, 0-dim, float32 (float64 for float64 weights), on the weights' device, not differentiable.

    Raises:
        ValueError: sparsity is outside [0, 1), there is no weight at all, or the weights are on several devices.
        TypeError: an argument has another type, or a tensor another dtype.

    Example:
        >>> model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
        >>> t = fk.functional.magnitude_threshold([model[0].weight, model[2].weight], sparsity=0.75)
        >>> sum(int((layer.weight.abs() <= t).sum()) for layer in (model[0], model[2]))  # of 192
        144
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
    """Return several weights as a list; raise TypeError unless they are a sequence, or an iterator, of tensors."""
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
    """Check all arguments of P(w) and return them as the ops take them, with None for the grad_scale 1."""
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
