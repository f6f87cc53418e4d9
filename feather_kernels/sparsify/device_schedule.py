"""The schedule as tables on the device, so that a CUDA graph can capture a training step."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from feather_kernels.dtypes import compute_dtype
from feather_kernels.sparsify.schedules import Schedule, sparsity_at

if TYPE_CHECKING:
    from feather_kernels.sparsify.policies import Policy


class DeviceSchedule:
    """A step counter on the device, and tables from which it computes the groups' quantiles at each step.

    The tables have a row per step: the level of all groups (``Policy.levels``), and if they change, the ramp of the
    groups with an override and the gradient scale; 8 bytes each. Ranks and fractions are computed from them on the
    device, in float64, with the same bits as on the host. Advancing does not wait for the device.

    Args:
        policy: the policy.
        schedule: the schedule.
        last_step: the step after which nothing changes.
        grad_scale: the gradient scale as a function of the sparsity.
        weight: one of the weights, for its device and compute dtype.

    Raises:
        ValueError: the policy cannot reach a sparsity of the schedule.
    """

    def __init__(
        self,
        policy: Policy,
        schedule: Schedule,
        last_step: int,
        grad_scale: Callable[[float], float],
        weight: Tensor,
    ) -> None:
        self._dtype = compute_dtype(weight.dtype)
        sparsities = [sparsity_at(schedule, step) for step in range(last_step + 1)]
        policy.positions(max(sparsities))  # raises if one cannot be reached
        levels, ramp = zip(*map(policy.levels, sparsities), strict=True)
        has_own = any(own is not None for own in policy.own_sparsities)
        raw = iter(() if policy.allocation is None else policy.allocation.raw)
        groups = [
            (count - 1, math.nan if own is None else own, next(raw, 0.0) if own is None else 0.0)
            for count, own in zip(policy.counts, policy.own_sparsities, strict=True)
        ]
        self._by_factor = policy.allocation is not None
        with torch.inference_mode(False):  # later steps count in any mode
            self._levels = _column(levels, weight.device)
            self._ramp = _column(ramp, weight.device) if has_own else None
            self._grad_scales = _column(list(map(grad_scale, sparsities)), weight.device)
            self._groups = torch.tensor(groups, dtype=torch.float64, device=weight.device).t().contiguous()
            self.step = torch.zeros((), dtype=torch.int64, device=weight.device)

    def follow(self, weight: Tensor) -> None:
        """Move to the device of the weight."""
        if self.step.device != weight.device:
            if self.step.device.type == "meta":
                raise RuntimeError("capturable needs weights with data: make the model sparse after to_empty()")
            with torch.inference_mode(False):
                for name, value in vars(self).items():
                    if isinstance(value, Tensor):
                        setattr(self, name, value.to(weight.device))

    def advance(self, skipped: Tensor | None = None) -> None:
        """Advance by one optimizer step, unless it was skipped.

        Args:
            skipped: one element, such as GradScaler's found_inf, that is not 0 if the optimizer skipped its step.
        """
        if skipped is None:
            self.step.add_(1)
        else:
            self.step.add_(skipped.to(self.step.device).reshape(()) == 0)

    def positions(self) -> tuple[Tensor, Tensor]:
        """The quantiles of the groups at the current step: ranks (G,), int64; fractions (G,), in the compute dtype."""
        last, own, raw = self._groups.unbind()
        level = self._now(self._levels)
        wanted = (1 - level * raw).clamp_min(0) if self._by_factor else level
        if self._ramp is not None:
            wanted = torch.where(own.isnan(), wanted, own * self._now(self._ramp))
        position = last * wanted
        rank = position.floor()
        some = (wanted > 0) & (last >= 0)
        fraction = torch.where(some, position - rank, 0.0)
        return torch.where(some, rank, -1.0).to(torch.int64), fraction.to(self._dtype)

    def grad_scale(self) -> Tensor:
        """Gradient scale at the current step, 0-dim."""
        return self._now(self._grad_scales).to(self._dtype)[0]

    def _now(self, column: Tensor) -> Tensor:
        """The value of a column at the current step, (1,)."""
        return column.index_select(0, self.step.clamp_max(len(column) - 1).reshape(1))


def _column(numbers: Sequence[float], device: torch.device) -> Tensor:
    """A column of a table, float64, without the rows at the end that repeat the last value."""
    length = len(numbers)
    while length > 1 and numbers[length - 2] == numbers[-1]:
        length -= 1
    return torch.tensor(numbers[:length], dtype=torch.float64, device=device)
