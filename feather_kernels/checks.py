"""Checks of arguments, each of which raises an error that names the argument, the value and what was expected.

Raised are TypeError for a wrong type or dtype and ValueError for a wrong value, shape or device.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from feather_kernels.dtypes import COMPUTE_DTYPE, WEIGHT_DTYPES, compute_dtype


def check_tensor(name: str, value: object) -> None:
    """Raise TypeError unless ``value`` is a tensor."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type_name(value)}")


def check_number(name: str, value: object, kind: type = numbers.Real) -> None:
    """Raise TypeError unless ``value`` is a number of ``kind``."""
    plain = (int,) if kind is numbers.Integral else (int, float)
    if isinstance(value, bool) or not isinstance(value, (*plain, kind)):
        what = "an integer" if kind is numbers.Integral else "a number"
        raise TypeError(f"{name} must be {what}, got {value!r}")


def check_sparsity(name: str, sparsity: float) -> None:
    """Raise unless ``0 <= sparsity < 1``."""
    check_number(name, sparsity)
    if not 0 <= sparsity < 1:
        wanted = f": {sparsity / 100:g}" if 1 < sparsity < 100 else ""
        hint = f" (a fraction of zeros, not a percentage{wanted})" if 1 < sparsity <= 100 else ""
        raise ValueError(f"{name} must be in [0, 1), got {sparsity}{hint}")


def check_power(power: float) -> None:
    """Raise unless ``1 <= power <= inf``."""
    check_number("power", power)
    if math.isnan(power) or power < 1:
        raise ValueError(f"power must be at least 1 (1: soft, 3: Feather, inf: hard thresholding), got {power}")


def check_grad_scale(grad_scale: float) -> None:
    """Raise unless ``0 <= grad_scale < inf``."""
    check_number("grad_scale", grad_scale)
    if not 0 <= grad_scale < math.inf:
        raise ValueError(f"grad_scale must be a finite number of at least 0, got {grad_scale}")


def check_constant(name: str, value: object) -> None:
    """Raise ValueError if ``value`` is a tensor that requires grad: the method takes it for a constant."""
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{name} must not require grad (the straight-through gradient treats it as a constant)")


def check_dtype(name: str, dtype: torch.dtype) -> None:
    """Raise TypeError unless ``dtype`` is a weight dtype."""
    if dtype not in WEIGHT_DTYPES:
        raise TypeError(f"{name} must be float16, bfloat16, float32 or float64, got {dtype}")


def check_weight(name: str, w: Tensor) -> None:
    """Raise TypeError unless ``w`` has a weight dtype and is a plain strided tensor."""
    check_dtype(name, w.dtype)
    if w.layout != torch.strided:
        raise TypeError(f"{name} must be a dense (strided) tensor, got layout {w.layout}")


def check_threshold(name: str, t: Tensor, w: Tensor) -> None:
    """Raise unless ``t`` is a 0-dim tensor in the compute dtype of ``w``, on its device."""
    if t.dim() != 0:
        raise ValueError(f"{name} must be a 0-dim tensor, got shape {tuple(t.shape)}")
    if t.dtype != compute_dtype(w.dtype):
        raise TypeError(f"{name} must be {compute_dtype(w.dtype)} for a {w.dtype} weight, got {t.dtype}")
    check_device(name, t, w)


def threshold_fits(w: Tensor, t: Tensor) -> bool:
    """Return whether ``check_weight`` and ``check_threshold`` pass; takes a third of their time."""
    return t.dtype is COMPUTE_DTYPE.get(w.dtype) and t.dim() == 0 and w.layout is torch.strided and t.device == w.device


def check_device(name: str, tensor: Tensor, other: Tensor) -> None:
    """Raise ValueError unless both tensors are on one device."""
    if tensor.device != other.device:
        raise ValueError(f"{name} must be on the weight's device {other.device}, got {tensor.device}")


def check_like(name: str, tensor: Tensor, w: Tensor) -> None:
    """Raise ValueError unless ``tensor`` has the shape and device of ``w``."""
    if tensor.shape != w.shape:
        raise ValueError(f"{name} must have the weight's shape {tuple(w.shape)}, got {tuple(tensor.shape)}")
    check_device(name, tensor, w)


def check_overlap(name: str, tensor: Tensor, w: Tensor) -> None:
    """Raise ValueError unless ``tensor`` is ``w`` or does not overlap it: else w is overwritten before it is read."""
    if tensor.untyped_storage()._cdata != w.untyped_storage()._cdata or not tensor.numel():
        return
    if (tensor.storage_offset(), tensor.stride(), tensor.dtype) == (w.storage_offset(), w.stride(), w.dtype):
        return
    begins, ends = zip(*(_span(x) for x in (tensor, w)), strict=True)
    if begins[0] < ends[1] and begins[1] < ends[0]:
        raise ValueError(f"{name} must be the weight itself or not overlap it, got views of one storage that do")


def check_weights(weights: Sequence[Tensor]) -> torch.dtype:
    """Check the weights that share one selection, and return their compute dtype."""
    if not weights:
        raise ValueError("weights must hold at least one tensor, got an empty list")
    dtype, device = compute_dtype(weights[0].dtype), weights[0].device
    for index, w in enumerate(weights):
        if COMPUTE_DTYPE.get(w.dtype) is dtype and w.layout is torch.strided and w.device == device:
            continue  # every step comes here for every weight: one condition
        check_weight(f"weights[{index}]", w)
        check_device(f"weights[{index}]", w, weights[0])
        if compute_dtype(w.dtype) != dtype:
            raise TypeError(
                f"weights must be all float64 or none, got {weights[0].dtype} first and {w.dtype} at index {index}"
            )
    return dtype


def check_groups(groups: Sequence[int], tensors: int, count: int) -> None:
    """Raise ValueError unless there is one group index in [0, count) per tensor."""
    if len(groups) != tensors:
        raise ValueError(f"groups must be one per weight ({tensors}), got {len(groups)}")
    for group in groups:
        if not 0 <= group < count:
            raise ValueError(f"groups must be in [0, {count}), got {group}")


def check_vector(name: str, vector: Tensor, size: int, dtype: torch.dtype, w: Tensor) -> None:
    """Raise unless ``vector`` is a 1-dim tensor of ``size`` and ``dtype`` on the device of ``w``."""
    if vector.shape != (size,):
        raise ValueError(f"{name} must have shape ({size},), got {tuple(vector.shape)}")
    if vector.dtype != dtype:
        raise TypeError(f"{name} must be {dtype}, got {vector.dtype}")
    check_device(name, vector, w)


def type_name(value: object) -> str:
    """Return the name of a value's type as messages give it, without the module for built-in types."""
    kind = type(value)
    return "None" if value is None else f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")


def _span(x: Tensor) -> tuple[int, int]:
    """Bytes of the storage between the first and the last element."""
    begin = x.storage_offset()
    end = begin + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) + 1
    return int(begin) * x.element_size(), int(end) * x.element_size()
