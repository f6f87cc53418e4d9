"""The op contract: schema, arguments and result of every op in ``torch.ops.feather_kernels``.

Each function below is the fake (meta) implementation of one op. It checks the arguments and allocates the result:
shape, dtype, strides and device. The real implementation (``ops/implementations.py``) calls the same function and hands
the result to a backend, which fills it in; so a fake can never disagree with a kernel.

Notation: w is a weight, ``t`` its threshold T, and the *compute dtype* of w is float64 for float64 weights and float32
for every other one. A weight is pruned iff ``T > 0 and abs(w) <= T``, evaluated in the compute dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from feather_kernels.checks import (
    check_device,
    check_dtype,
    check_groups,
    check_like,
    check_overlap,
    check_power,
    check_threshold,
    check_vector,
    check_weight,
    check_weights,
    threshold_fits,
)
from feather_kernels.dtypes import COMPUTE_DTYPE, KEY_BITS

NAMESPACE = "feather_kernels"


class Op(NamedTuple):
    """An op of the library.

    Attributes:
        schema: the full schema.
        fake: checks the arguments and allocates the result.
    """

    schema: str
    fake: Callable[..., Tensor | None]

    @property
    def name(self) -> str:
        """The name with the overload, e.g. ``threshold.out``."""
        return self.schema.split("(", 1)[0]


OPS: dict[str, Op] = {}
Fake = TypeVar("Fake", bound=Callable[..., "Tensor | None"])


def _op(schema: str) -> Callable[[Fake], Fake]:
    def register(fake: Fake) -> Fake:
        op = Op(schema, fake)
        OPS[op.name] = op
        return fake

    return register


def check_operands(w: Tensor, t: Tensor, p: float) -> None:
    """Raise unless these can be the arguments of ``threshold``."""
    if threshold_fits(w, t) and p >= 1:
        return
    check_weight("w", w)
    check_threshold("t", t, w)
    check_power(p)


def check_gradient(g: Tensor, w: Tensor, t: Tensor, grad_scale: Tensor) -> None:
    """Raise unless these can be the arguments of ``scale_pruned_grad``."""
    wanted, layout, device = COMPUTE_DTYPE.get(w.dtype), w.layout, w.device
    if (
        t.dtype is grad_scale.dtype is wanted
        and g.dtype in COMPUTE_DTYPE
        and g.layout is layout is torch.strided
        and t.dim() == grad_scale.dim() == 0
        and t.device == grad_scale.device == g.device == device
        and g.shape == w.shape
    ):
        return  # every call comes here: one condition
    check_weight("g", g)
    check_weight("w", w)
    check_like("g", g, w)
    check_threshold("t", t, w)
    check_threshold("grad_scale", grad_scale, w)


@_op("threshold(Tensor w, Tensor t, float p, *, ScalarType? out_dtype=None) -> Tensor")
def threshold(w: Tensor, t: Tensor, p: float, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """Thresholding operator ``P(w) = sign(w) (abs(w)^p - T^p)^(1/p)`` where kept, +0.0 where pruned.

    w: any shape and strides, float16, bfloat16, float32 or float64. t: 0-dim, compute dtype of w, on w's device.
    p: power, >= 1 or inf. Result: w's shape, ``out_dtype`` (default w's), w's strides where w is dense.
    """
    check_operands(w, t, p)
    if out_dtype is None:
        return torch.empty_like(w)
    check_dtype("out_dtype", out_dtype)
    return torch.empty_like(w, dtype=out_dtype)


@_op("threshold.out(Tensor w, Tensor t, float p, *, Tensor(a!) out) -> ()")
def threshold_out(w: Tensor, t: Tensor, p: float, *, out: Tensor) -> None:
    """``threshold`` written into ``out``: w's shape, any weight dtype; ``out`` may be w itself."""
    check_operands(w, t, p)
    check_weight("out", out)
    check_like("out", out, w)
    check_overlap("out", out, w)


@_op("threshold_recompute(Tensor w, Tensor t, float p, Tensor after, *, ScalarType? out_dtype=None) -> Tensor")
def threshold_recompute(
    w: Tensor,
    t: Tensor,
    p: float,
    after: Tensor,  # noqa: ARG001
    *,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """``threshold`` for use in a backward pass, which takes the incoming gradient as the unused operand ``after``.

    If backward called ``threshold`` itself, torch.compile would merge it with the call in forward, and keep the copy of
    the weights that recomputing avoids.
    """
    return threshold(w, t, p, out_dtype=out_dtype)


@_op("scale_pruned_grad(Tensor g, Tensor w, Tensor t, Tensor grad_scale, *, ScalarType? out_dtype=None) -> Tensor")
def scale_pruned_grad(
    g: Tensor, w: Tensor, t: Tensor, grad_scale: Tensor, *, out_dtype: torch.dtype | None = None
) -> Tensor:
    """Straight-through gradient ``g * (1 where kept, grad_scale where pruned)``.

    g: w's shape, any weight dtype, any strides (expanded too). grad_scale: 0-dim, dtype and device of t.
    Result: w's shape and strides, ``out_dtype`` (default w's dtype). Kept entries are g rounded to the result's dtype.
    """
    check_gradient(g, w, t, grad_scale)
    if out_dtype is not None:
        check_dtype("out_dtype", out_dtype)
    return torch.empty_like(w, dtype=out_dtype)


@_op(
    "magnitude_select(Tensor[] weights, int[] groups, Tensor rank, *, "
    "Tensor? scales=None, Tensor? caps=None, Tensor? hint=None) -> Tensor"
)
def magnitude_select(
    weights: Sequence[Tensor],
    groups: Sequence[int],
    rank: Tensor,
    *,
    scales: Tensor | None = None,
    caps: Tensor | None = None,
    hint: Tensor | None = None,
) -> Tensor:
    """Exact order statistics ``v[rank], v[rank + 1]`` of the scores of each group of weights; v is sorted ascending.

    The score of an element is ``scales[l] * abs(w)``, rounded in the compute dtype; NaN sorts last.

    weights: L tensors, of float64 only or of the other dtypes in any mix; empty ones allowed. groups: group of each
    tensor, in [0, G). rank: int64 (G,), on the weights' device, 0-based; the neighbour of the last rank is the last
    element itself; a rank outside its group gives NaN. scales: (L,) in the compute dtype, not negative. caps: int64
    (L,); of tensor l only the caps[l] smallest elements take part. hint: (G, 2), the result of an earlier call, or
    None; it may save time and never changes the result.

    Result: (G, 2) in the compute dtype, bit-identical to sorting, every NaN the quiet one, on the device; nothing is
    read on the host.
    """
    dtype = check_weights(weights)
    check_groups(groups, len(weights), rank.numel())
    check_vector("rank", rank, rank.numel(), torch.int64, weights[0])
    if scales is not None:
        check_vector("scales", scales, len(weights), dtype, weights[0])
    if caps is not None:
        check_vector("caps", caps, len(weights), torch.int64, weights[0])
    if hint is not None:
        check_device("hint", hint, weights[0])
        if hint.shape != (rank.numel(), 2) or hint.dtype != dtype:
            raise ValueError(f"hint must be {(rank.numel(), 2)} {dtype}, got {tuple(hint.shape)} {hint.dtype}")
    return rank.new_empty((rank.numel(), 2), dtype=dtype)


@_op(
    "magnitude_histogram(Tensor[] weights, int[] groups, Tensor prefix, int shift, int bits, *, "
    "Tensor? scales=None) -> Tensor"
)
def magnitude_histogram(
    weights: Sequence[Tensor],
    groups: Sequence[int],
    prefix: Tensor,
    shift: int,
    bits: int,
    *,
    scales: Tensor | None = None,
) -> Tensor:
    """One radix pass: per group, how many keys have each value of the ``bits`` bits above ``shift``.

    The key of an element is the bit pattern of its score (see ``magnitude_select``) as an integer, NaN as the one key
    behind inf; only keys whose bits above ``shift + bits`` equal prefix[group] are counted.

    weights, groups, scales: as for ``magnitude_select``. prefix: int64 (G,). Result: int64 (G, 2^bits). Integer counts
    add up over tensors and ranks, which is what a distributed selection all-reduces; caps apply after that sum.
    """
    dtype = check_weights(weights)
    check_groups(groups, len(weights), prefix.numel())
    check_vector("prefix", prefix, prefix.numel(), torch.int64, weights[0])
    if scales is not None:
        check_vector("scales", scales, len(weights), dtype, weights[0])
    width = KEY_BITS[dtype]
    if not (1 <= bits <= 16 and 0 <= shift <= width - bits):
        raise ValueError(
            f"bits must be in [1, 16] and shift in [0, {width} - bits] for {dtype} keys, got {bits=} {shift=}"
        )
    return prefix.new_empty((prefix.numel(), 1 << bits))


@_op("count_pruned(Tensor[] weights, Tensor[] thresholds) -> Tensor")
def count_pruned(weights: Sequence[Tensor], thresholds: Sequence[Tensor]) -> Tensor:
    """Number of pruned elements of each weight under its threshold: int64 (L,), on the device.

    weights: L tensors on one device. thresholds: L 0-dim tensors, each as ``t`` of ``threshold`` for its weight.
    """
    if not weights:
        raise ValueError("weights must hold at least one tensor, got an empty list")
    if len(weights) != len(thresholds):
        raise ValueError(f"thresholds must be one per weight ({len(weights)}), got {len(thresholds)}")
    for index, (w, t) in enumerate(zip(weights, thresholds, strict=True)):
        check_weight(f"weights[{index}]", w)
        check_threshold(f"thresholds[{index}]", t, w)
        check_device(f"weights[{index}]", w, weights[0])
    return weights[0].new_empty((len(weights),), dtype=torch.int64)
