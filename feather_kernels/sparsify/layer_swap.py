"""Makes the layers of a model sparse, and dense again, by swapping their classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from torch.nn.utils.parametrize import is_parametrized

from feather_kernels.nn import conversion
from feather_kernels.nn.thresholds import ThresholdBinding, Thresholds

if TYPE_CHECKING:
    from torch import nn

    from feather_kernels.nn.base import SparseLayer
    from feather_kernels.sparsify.overrides import Override
    from feather_kernels.sparsify.prunable import PrunableWeight, WeightUse


def uses_of(weights: Sequence[PrunableWeight]) -> list[WeightUse]:
    """All uses of the weights by layers, in order."""
    return [use for weight in weights for use in weight.uses]


def make_sparse(
    weights: Sequence[PrunableWeight],
    settings: Sequence[Override],
    power: float,
    grad_scale: float,
    scales_change: bool,
    recompute: bool | None,
) -> Thresholds:
    """Make the layers sparse.

    Args:
        weights: the prunable weights.
        settings: the override of each weight.
        power: p for weights without an override.
        grad_scale: the gradient scale at the beginning, for weights without an override.
        scales_change: whether gradient scales change during training.
        recompute: as in ``Sparsifier``.

    Returns:
        The thresholds, one per use of a weight, in the order of ``uses_of``.
    """
    uses = uses_of(weights)
    per_use = [setting for setting, weight in zip(settings, weights, strict=True) for _ in weight.uses]
    thresholds = Thresholds(
        [power if setting.power is None else setting.power for setting in per_use],
        [grad_scale if setting.grad_scale is None else setting.grad_scale for setting in per_use],
        scales_change,
        recompute,
        total_bytes=sum(use.latent.numel() * use.latent.element_size() for use in uses),
    )
    by_module: dict[nn.Module, dict[str, ThresholdBinding]] = {}
    for index, use in enumerate(uses):
        by_module.setdefault(use.module, {})[use.parameter_name] = ThresholdBinding(thresholds, index, use.latent)
    for use in uses:
        if use.module in by_module:
            conversion.make_sparse(use.module, by_module.pop(use.module), use.form)
    return thresholds


def make_dense(weights: Sequence[PrunableWeight]) -> None:
    """Give the layers their dense classes back; the weights stay as they are."""
    for module in dict.fromkeys(use.module for use in uses_of(weights)):
        conversion.make_dense(cast("SparseLayer", module))


def write_zeros(weights: Sequence[PrunableWeight]) -> None:
    """Write P(w) into every weight; tied weights are written once."""
    for weight in weights:
        use = weight.uses[0]
        conversion.finalize_weight(cast("SparseLayer", use.module), use.parameter_name)


def check_not_parametrized(weights: Sequence[PrunableWeight]) -> None:
    """Raise RuntimeError if a layer was parametrized after it was made sparse."""
    for use in uses_of(weights):
        if is_parametrized(use.module):
            raise RuntimeError(
                f"{use.name} was parametrized after it was made sparse: remove the parametrization first"
            )
