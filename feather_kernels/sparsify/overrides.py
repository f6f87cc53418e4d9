"""Options of single layers, and which entry of ``overrides`` applies to which weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from feather_kernels.checks import check_grad_scale, check_number, check_power, check_sparsity
from feather_kernels.sparsify.layer_names import Target, check_entry, matches

if TYPE_CHECKING:
    from feather_kernels.sparsify.prunable import PrunableWeight


@dataclass(frozen=True)
class Override:
    """Options of one layer, which replace the sparsifier's unless they are None.

    Attributes:
        sparsity: final sparsity of the layer, which then has its own threshold; it rises along the schedule.
        min_density: fraction of the weights that the layer keeps at least.
        power: p of the thresholding operator.
        grad_scale: factor of the gradient of pruned weights.
    """

    sparsity: float | None = None
    min_density: float | None = None
    power: float | None = None
    grad_scale: float | None = None

    def __post_init__(self) -> None:
        if self.sparsity is not None:
            check_sparsity("overrides: sparsity", self.sparsity)
        if self.min_density is not None:
            check_min_density(self.min_density)
        if self.power is not None:
            check_power(self.power)
        if self.grad_scale is not None:
            check_grad_scale(self.grad_scale)


def resolve_overrides(
    weights: Sequence[PrunableWeight], overrides: Mapping[Target, Mapping[str, Any]] | None
) -> list[Override]:
    """The options of each weight; each option comes from the most specific entry that has it.

    Names precede ``re:`` patterns, which precede classes. A longer name precedes a shorter one, which names a module
    around it. Otherwise the order of the entries decides.

    Args:
        weights: the prunable weights.
        overrides: the entries.

    Raises:
        ValueError: an entry matches no prunable weight, has an unknown option, or a value is out of range.
        TypeError: an entry is no mapping, or a value no number.
    """
    if overrides is not None and not isinstance(overrides, Mapping):
        raise TypeError(f"overrides must be a dict from layers to options, got {overrides!r}")
    entries = {target: _make_override(target, options) for target, options in (overrides or {}).items()}
    for target in entries:
        check_entry("overrides", target)
        if not any(_applies(target, weight) for weight in weights):
            raise ValueError(f"overrides must match prunable layers, but {target!r} matches none")
    ordered = sorted(entries, key=_specificity)
    return [_merge([entries[target] for target in ordered if _applies(target, weight)]) for weight in weights]


def _specificity(target: Target) -> tuple[int, int]:
    if not isinstance(target, str):
        return 2, 0
    return (1, 0) if target.startswith("re:") else (0, -len(target))


def _merge(entries: Sequence[Override]) -> Override:
    """Take each option from the first entry that has it."""
    return Override(
        **{
            option.name: next((v for v in (getattr(e, option.name) for e in entries) if v is not None), None)
            for option in fields(Override)
        }
    )


def _applies(target: Target, weight: PrunableWeight) -> bool:
    return any(matches((use.layer_name, use.path), use.module, [target]) for use in weight.uses)


def _make_override(target: Target, options: Mapping[str, Any]) -> Override:
    if not isinstance(options, Mapping):
        raise TypeError(f"overrides[{target!r}] must be a dict of options, got {options!r}")
    known = [entry.name for entry in fields(Override)]
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise ValueError(
            f"overrides[{target!r}] must have only the options {', '.join(known)}; got {', '.join(unknown)}"
        )
    return Override(**options)


def check_min_density(min_density: float) -> None:
    """Raise ValueError unless ``0 <= min_density <= 1``."""
    check_number("min_density", min_density)
    if not 0 <= min_density <= 1:
        raise ValueError(f"min_density must be in [0, 1], got {min_density}")
