"""How the sparsity is divided among the weights: scopes, allocation over layers, minimal densities, score scales.

A policy divides the weights into groups. The N elements of a group share a threshold, the quantile of their scores at
the position ``m = (N - 1) s`` for the sparsity s of the group. One pass over the weights selects for all groups.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from feather_kernels.backends.interface import Selection
from feather_kernels.dtypes import compute_dtype
from feather_kernels.quantile import interpolate, quantile_position
from feather_kernels.sparsify.allocation import ErdosRenyiKernel
from feather_kernels.sparsify.overrides import Override, check_min_density
from feather_kernels.sparsify.statistics import WHOLE_WEIGHTS, Statistics

if TYPE_CHECKING:
    from feather_kernels.sparsify.prunable import PrunableWeight

ScopeFunction = Callable[[list[Tensor], float], Tensor]
SCOPES = ("global", "layer", "erk")
SCORE_SCALES = ("none", "l2", "fan")


@dataclass(frozen=True)
class Positions:
    """The quantiles of the thresholds of the G groups.

    Attributes:
        ranks: of the order statistics below the thresholds; -1 for groups that are not pruned.
        fractions: in [0, 1), of the way from there to the next order statistic.
    """

    ranks: list[int]
    fractions: list[float]


class Policy:
    """Divides the sparsity among the L weights of a model and selects their thresholds.

    Args:
        weights: the prunable weights.
        scope: "global": one group; "layer": every weight is a group, at the schedule's sparsity; "erk": every weight
            is a group, with a density proportional to ``sum(shape) / prod(shape)`` (Erdos-Renyi kernel), averaging the
            schedule's over the layers without an override of the sparsity; or a function ``f(weights, sparsity)`` that
            returns thresholds, (L,) or 0-dim.
        min_density: every weight keeps at least ``ceil(min_density * numel)`` elements; the rest of its group
            is pruned more to compensate.
        score_scale: "none"; "l2": scores are ``abs(w) / ||w||``; "fan": ``abs(w) / sqrt(sum(shape))``.
        overrides: one per weight.
        final_sparsity: of the schedule; needed by overrides of the sparsity, and to check ``min_density``.
        captured: whether a CUDA graph may capture a selection, so that its hints must stay in one buffer.

    Raises:
        ValueError: an argument is unknown, out of range, or contradicts another.

    Example:
        >>> from feather_kernels.sparsify.overrides import Override
        >>> from feather_kernels.sparsify.policies import Policy
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> weights, _, _ = fk.sparsify.choose_weights(model, fk.sparsify.LayerChoice())
        >>> policy = Policy(weights, "layer", 0.0, "none", [Override(), Override(sparsity=0.5)], final_sparsity=0.9)
        >>> policy.positions(0.9).ranks
        [1842, 159]
        >>> policy.thresholds_at([weight.parameter for weight in weights], 0.9).shape
        torch.Size([2])
    """

    def __init__(
        self,
        weights: Sequence[PrunableWeight],
        scope: str | ScopeFunction,
        min_density: float,
        score_scale: str,
        overrides: Sequence[Override],
        final_sparsity: float | None,
        captured: bool = False,
    ) -> None:
        _check_policy(scope, min_density, score_scale)
        self.scope = scope
        self.score_scale = score_scale
        self.final_sparsity = final_sparsity
        self.captured = captured
        self.names = [weight.name for weight in weights]
        self.shapes = [tuple(weight.parameter.shape) for weight in weights]
        self.numels = [math.prod(shape) for shape in self.shapes]
        self.sparsities = [override.sparsity for override in overrides]
        self.grad_scales = [override.grad_scale for override in overrides]
        self.groups = self._make_groups()
        self.members: list[list[int]] = [[] for _ in range(max(self.groups) + 1)]
        for index, group in enumerate(self.groups):
            self.members[group].append(index)
        self.own_sparsities = [self.sparsities[members[0]] for members in self.members]  # of groups
        free = [shape for shape, own in zip(self.shapes, self.sparsities, strict=True) if own is None]
        self.allocation = ErdosRenyiKernel(free) if scope == "erk" else None
        self.counts = [sum(self.numels[index] for index in members) for members in self.members]
        densities = [min_density if o.min_density is None else o.min_density for o in overrides]
        caps = [n - math.ceil(d * n) for n, d in zip(self.numels, densities, strict=True)]
        self.caps = caps if any(densities) else None
        self._on_device: dict[tuple[str, torch.device], Tensor] = {}
        self._hints: dict[tuple[bool, bool, torch.device, torch.dtype], Tensor] = {}
        self._last_positions: tuple[tuple[Any, ...], tuple[Tensor, Tensor | float] | None] = ((), None)
        if callable(scope) and (self.caps or score_scale != "none" or any(s is not None for s in self.sparsities)):
            raise ValueError("scope must be a name if min_density, score_scale or an override of the sparsity is given")
        if any(self.sparsities) and not final_sparsity:
            raise ValueError(
                f"overrides: sparsity needs a schedule with a final_sparsity above 0, got {final_sparsity}"
            )
        if final_sparsity is not None:
            self.positions(final_sparsity)

    def positions(self, sparsity: float) -> Positions:
        """The quantiles of all groups.

        Args:
            sparsity: of the schedule.

        Raises:
            ValueError: ``min_density`` leaves too little to prune; the message names the sparsity within reach.
        """
        ranks, fractions = [], []
        for group, wanted in enumerate(self._group_sparsities(sparsity)):
            members = self.members[group]
            count = self.counts[group]
            rank, fraction = quantile_position(count, wanted) if wanted > 0 and count else (-1, 0.0)
            available = sum(self.caps[i] for i in members) if self.caps else count
            if rank >= available:
                reachable = math.floor(available / count * 1e4) / 1e4  # rounded down, so that it can be reached
                where = f" in the group of {self.names[members[0]]}" if len(members) < len(self.numels) else ""
                raise ValueError(
                    f"min_density must leave {rank + 1} weights to prune{where}, got {available} of {count}: "
                    f"sparsity {reachable:.4f} can be reached, not {wanted:.4f}"
                )
            ranks.append(rank)
            fractions.append(fraction)
        return Positions(ranks, fractions)

    def budget(self, sparsity: float) -> int:
        """Number of zeros that a sparsity asks for, in all groups together.

        Args:
            sparsity: of the schedule.
        """
        if sparsity == 0:
            return 0
        if callable(self.scope):
            return quantile_position(sum(self.numels), sparsity)[0] + 1
        return sum(rank + 1 for rank in self.positions(sparsity).ranks)

    def thresholds_at(
        self, parameters: list[Tensor], sparsity: float, statistics: Statistics = WHOLE_WEIGHTS
    ) -> Tensor:
        """Select the thresholds at a sparsity.

        Args:
            parameters: the L weights, or what this process has of them.
            sparsity: of the schedule.
            statistics: of the whole weights.

        Returns:
            (L,), on the device of the weights.
        """
        if callable(self.scope):
            dtype = compute_dtype(parameters[0].dtype)
            return _check_thresholds(self.scope(parameters, sparsity), len(parameters)).to(dtype)
        positions = self._positions_on_device(sparsity, parameters[0])
        return (
            self.no_thresholds(parameters[0])
            if positions is None
            else self.thresholds(parameters, *positions, statistics)
        )

    def no_thresholds(self, like: Tensor) -> Tensor:
        """Thresholds at which nothing is pruned.

        Args:
            like: a weight.

        Returns:
            (L,) zeros, on the device of the weight.
        """
        return like.new_zeros(len(self.numels), dtype=compute_dtype(like.dtype))

    def _positions_on_device(self, sparsity: float, like: Tensor) -> tuple[Tensor, Tensor | float] | None:
        """Ranks (G,) and fractions, (G,) or a number; None if nothing is pruned. The last result is cached."""
        key = sparsity, like.device, compute_dtype(like.dtype)
        if self._last_positions[0] != key:
            ranks, fractions = (positions := self.positions(sparsity)).ranks, positions.fractions
            moved: tuple[Tensor, Tensor | float] | None = None
            if max(ranks) >= 0:
                one = len(fractions) == 1
                moved_fractions = fractions[0] if one else to_device(fractions, key[2], like.device)
                moved = to_device(ranks, torch.int64, like.device), moved_fractions
            self._last_positions = key, moved
        return self._last_positions[1]

    def thresholds(
        self,
        parameters: Sequence[Tensor],
        ranks: Tensor,
        fractions: Tensor | float,
        statistics: Statistics = WHOLE_WEIGHTS,
    ) -> Tensor:
        """Select the thresholds at given quantiles, without waiting for the device.

        Args:
            parameters: the L weights, or what this process has of them.
            ranks: int64 (G,), on the device of the weights.
            fractions: (G,) in the compute dtype; or a number, if there is a single group and it is pruned.
            statistics: of the whole weights.

        Returns:
            (L,), on the device of the weights.
        """
        scales = self.scales(parameters, statistics)
        caps = None if self.caps is None else self._constant("caps", self.caps, torch.int64, ranks.device)
        thresholds = interpolate(self._select(statistics, parameters, self.groups, ranks, scales, caps), fractions)
        if isinstance(fractions, Tensor):
            thresholds = torch.where(ranks < 0, 0.0, thresholds)
        if len(self.members) == 1:
            thresholds = thresholds.expand(len(parameters))
        else:
            thresholds = thresholds[self._constant("groups", self.groups, torch.int64, ranks.device)]
        if scales is not None:
            thresholds = largest_below(thresholds, scales)
        if caps is not None:
            own = self._select(statistics, parameters, range(len(parameters)), caps - 1)[:, 0]
            thresholds = torch.minimum(thresholds, torch.where(caps == 0, 0.0, own))
        return thresholds

    def _select(
        self,
        statistics: Statistics,
        parameters: Sequence[Tensor],
        groups: Sequence[int],
        ranks: Tensor,
        scales: Tensor | None = None,
        caps: Tensor | None = None,
    ) -> Tensor:
        """Select (G, 2) order statistics, with the last result as hint."""
        dtype = compute_dtype(parameters[0].dtype)
        shared = statistics is not WHOLE_WEIGHTS  # by other processes, which must have the same hint
        key = (caps is not None, shared, ranks.device, dtype)
        hint = self._hints.get(key)
        if hint is None:  # NaN is no hint, but makes the first step compile all kernels
            hint = self._hints[key] = torch.full((len(ranks), 2), math.nan, dtype=dtype, device=ranks.device)
        values = statistics.select(Selection(parameters, groups, ranks, scales, caps, hint))
        if self.captured:
            hint.copy_(values)
        else:
            self._hints[key] = values
        return values

    def with_own_grad_scales(self, scale: Tensor | float, like: Tensor) -> Tensor:
        """Gradient scales of all weights.

        Args:
            scale: the sparsifier's, for weights without an override.
            like: a tensor with the dtype and device of the result.

        Returns:
            (L,).
        """
        scales = scale if isinstance(scale, Tensor) else like.new_full((), scale)
        if all(own is None for own in self.grad_scales):
            return scales.expand(len(self.grad_scales))
        numbers = [math.nan if own is None else own for own in self.grad_scales]
        own = self._constant("grad_scales", numbers, like.dtype, like.device)
        return torch.where(own.isnan(), scales, own)

    def _constant(self, name: str, values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
        """Host numbers as a vector on the device, copied once: a captured step must not copy from the host."""
        key = (name, device)
        if key not in self._on_device or self._on_device[key].dtype != dtype:
            self._on_device[key] = to_device(values, dtype, device)
        return self._on_device[key]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_on_device": {}, "_hints": {}, "_last_positions": ((), None)}

    def _make_groups(self) -> list[int]:
        """The group of each weight: an override of the sparsity makes a group of its own."""
        alone = [self.scope != "global" or sparsity is not None for sparsity in self.sparsities]
        free = itertools.count(0 if all(alone) else 1)
        return [next(free) if is_alone else 0 for is_alone in alone]

    def levels(self, sparsity: float) -> tuple[float, float]:
        """The two numbers from which the sparsities of all groups follow.

        Args:
            sparsity: of the schedule.

        Returns:
            The sparsity of the groups without an override (for "erk" the factor of their densities), and the fraction
            of their final sparsity that the groups with an override have reached.
        """
        level = sparsity if self.allocation is None else self.allocation.factor(sparsity)
        return level, min(1.0, sparsity / self.final_sparsity) if self.final_sparsity else 0.0

    def _group_sparsities(self, sparsity: float) -> list[float]:
        level, ramp = self.levels(sparsity)
        shared = itertools.repeat(level) if self.allocation is None else iter(self.allocation.sparsities(level))
        return [next(shared) if own is None else own * ramp for own in self.own_sparsities]

    def scales(self, parameters: Sequence[Tensor], statistics: Statistics = WHOLE_WEIGHTS) -> Tensor | None:
        """The factors by which magnitudes are multiplied to give scores.

        Args:
            parameters: the L weights, or what this process has of them.
            statistics: of the whole weights.

        Returns:
            (L,), or None if scores are magnitudes.
        """
        if self.score_scale == "none":
            return None
        dtype = compute_dtype(parameters[0].dtype)
        if self.score_scale == "fan":
            factors = [1 / math.sqrt(sum(shape)) if shape else 1.0 for shape in self.shapes]
            return self._constant("factors", factors, dtype, parameters[0].device)
        norms = statistics.norms(list(parameters), dtype)
        return torch.where(norms > 0, 1 / norms, 0.0)


def largest_below(levels: Tensor, scales: Tensor) -> Tensor:
    """Elementwise the largest a >= 0 whose rounded score ``scale * a`` does not exceed the level; levels <= 0 stay.

    The search starts from ``(level + half an ulp) / scale``, which is at most two numbers off, and goes up, then down.
    Small levels are multiplied by a power of two first: half an ulp of a subnormal level, which spans many a, would be
    lost otherwise.
    """
    up = torch.full_like(levels, math.inf)
    lift = torch.where(levels < 2.0**-60, torch.full_like(levels, 2.0**64), 1.0)
    half_ulp = torch.where(levels.isinf(), 0.0, (torch.nextafter(levels, up) - levels) * (lift / 2))
    a = (levels * lift + half_ulp) / scales / lift
    for _ in range(2):
        a = torch.nextafter(a, up)
    for _ in range(5):
        a = torch.where(scales * a <= levels, a, torch.nextafter(a, -up))
    return torch.where(levels > 0, a, levels)


def to_device(values: Sequence[float], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Host numbers as a vector on the device, without waiting for it; never an inference tensor, as it may be kept."""
    with torch.inference_mode(False):
        if len(values) == 1:
            return torch.full((1,), values[0], dtype=dtype, device=device)
        pinned = device.type == "cuda"
        return torch.tensor(values, dtype=dtype, device="cpu", pin_memory=pinned).to(device, non_blocking=True)


def _check_policy(scope: str | ScopeFunction, min_density: float, score_scale: str) -> None:
    if not callable(scope) and scope not in SCOPES:
        raise ValueError(f"scope must be one of {', '.join(SCOPES)} or a function, got {scope!r}")
    if score_scale not in SCORE_SCALES:
        raise ValueError(f"score_scale must be one of {', '.join(SCORE_SCALES)}, got {score_scale!r}")
    check_min_density(min_density)


def _check_thresholds(thresholds: object, count: int) -> Tensor:
    """Expand what a scope function returned to (L,); raises ValueError unless it fits."""
    if not isinstance(thresholds, Tensor) or thresholds.shape not in ((), (count,)):
        got = tuple(thresholds.shape) if isinstance(thresholds, Tensor) else type(thresholds).__name__
        raise ValueError(f"scope must return a tensor of shape () or ({count},), got {got}")
    return thresholds.detach().expand(count)
