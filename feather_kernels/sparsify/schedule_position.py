"""The position of a training in its schedule."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from feather_kernels.sparsify.options import ConstantScale
from feather_kernels.sparsify.schedules import ConstantSchedule, Schedule, sparsity_at
from feather_kernels.sparsify.statistics import WHOLE_WEIGHTS, Statistics

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from feather_kernels.sparsify.device_schedule import DeviceSchedule
    from feather_kernels.sparsify.policies import Policy


class SchedulePosition:
    """The current step of a schedule, with the sparsity and gradient scale at that step.

    Deep copies of a model share the position of the original, so that an average follows the ramp. A pickled position
    keeps the sparsity and gradient scale of its moment.

    Args:
        schedule: the schedule.
        grad_scale: the gradient scale as a function of the sparsity.
        device_schedule: the schedule on the device, which then counts the steps; or None.

    Attributes:
        key: identifies the position in copies and pickles of its models.
        advances: how often it has moved, counted on the host.
        followers: the hooks that select thresholds at this position.
    """

    def __init__(
        self, schedule: Schedule, grad_scale: Callable[[float], float], device_schedule: DeviceSchedule | None = None
    ) -> None:
        self.schedule = schedule
        self.scale_at = grad_scale
        self.device_schedule = device_schedule
        self.key = uuid.uuid4().hex
        self._step = 0
        self.advances = 0
        self.followers: WeakSet[Any] = WeakSet()

    def advance(self, skipped: Tensor | None = None) -> None:
        """Advance by one optimizer step, unless it was skipped.

        Args:
            skipped: one element, such as GradScaler's found_inf, that is not 0 if the optimizer skipped its step. The
                host reads it unless the device counts the steps.
        """
        self.advances += 1
        if self.device_schedule is not None:
            self.device_schedule.advance(skipped)
        elif skipped is None or not skipped.item():
            self._step += 1

    def move_to(self, step: int) -> None:
        """Continue from ``step``."""
        self.advances += 1
        self._step = step
        if self.device_schedule is not None:
            self.device_schedule.step.fill_(step)

    @property
    def step(self) -> int:
        """Number of optimizer steps so far; read from the device if that counts them."""
        return self._step if self.device_schedule is None else int(self.device_schedule.step)

    @property
    def counted_step(self) -> int | Tensor:
        """The same where it is counted: a 0-dim tensor on a device, or a number."""
        return self._step if self.device_schedule is None else self.device_schedule.step

    @property
    def sparsity(self) -> float:
        """Sparsity of the schedule at this step."""
        return sparsity_at(self.schedule, self.step)

    def grad_scale(self, device: torch.device) -> float | Tensor:
        """Gradient scale at this step; a 0-dim tensor on ``device`` if the device counts the steps."""
        if self.device_schedule is None:
            return self.scale_at(self.sparsity)
        return self.device_schedule.grad_scale().to(device)

    def independent(self) -> SchedulePosition:
        """Another position at the same step of the same schedule."""
        twin = SchedulePosition(self.schedule, self.scale_at, copy.deepcopy(self.device_schedule))
        twin._step = self._step
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> SchedulePosition:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        sparsity = self.sparsity
        return _fixed, (self.key, self.step, sparsity, self.scale_at(sparsity))


def _fixed(key: str, step: int, sparsity: float, grad_scale: float) -> SchedulePosition:
    position = SchedulePosition(ConstantSchedule(sparsity), ConstantScale(grad_scale))
    position.key, position._step = key, step
    return position


def select_at(
    position: SchedulePosition,
    policy: Policy,
    parameters: Sequence[Tensor],
    statistics: Statistics = WHOLE_WEIGHTS,
) -> Tensor:
    """Select the (L,) thresholds of the weights at a position; they are 0 for weights on the meta device."""
    first = parameters[0]
    devices = {parameter.device for parameter in parameters}
    if len(devices) > 1:
        raise ValueError(f"the prunable weights must be on one device, got {sorted(map(str, devices))}")
    if first.device.type == "meta":
        return policy.no_thresholds(first)
    if position.device_schedule is not None:
        ranks, fractions = position.device_schedule.positions()
        return policy.thresholds(parameters, ranks.to(first.device), fractions.to(first.device), statistics)
    return policy.thresholds_at(list(parameters), position.sparsity, statistics)
