"""Where in its schedule a training stands."""

from __future__ import annotations

import copy
import uuid
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from feather_kernels.sparsify.options import ConstantScale
from feather_kernels.sparsify.schedules import ConstantSchedule, Schedule, sparsity_at

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from feather_kernels.sparsify.device_schedule import DeviceSchedule
    from feather_kernels.sparsify.policies import Policy


class SchedulePosition:
    """The step of a schedule, and what the schedule asks for at that step.

    Deep copies of a model share the position of the original, so that an average follows the ramp. A pickle keeps what
    is asked for at the moment.

    Args:
        schedule: the schedule.
        grad_scale: gradient scale at a sparsity.
        device_schedule: the same as tables on the device; it then counts the steps.
    """

    def __init__(
        self, schedule: Schedule, grad_scale: Callable[[float], float], device_schedule: DeviceSchedule | None = None
    ) -> None:
        self.schedule = schedule
        self.scale_at = grad_scale
        self.device_schedule = device_schedule
        self.key = uuid.uuid4().hex  # the same in copies and pickles of models that belong to this position
        self._step = 0
        self.advances = 0  # how often it has moved, counted on the host
        self.followers: WeakSet[Any] = WeakSet()  # what selects thresholds at this position

    def advance(self, skipped: Tensor | None = None) -> None:
        """One optimizer step further; none where ``skipped``, one element such as GradScaler's found_inf, is not 0.

        It is read on the host unless steps are counted on a device.
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
        """Number of optimizer steps so far; read from the device where it is counted there."""
        return self._step if self.device_schedule is None else int(self.device_schedule.step)

    @property
    def sparsity(self) -> float:
        """Sparsity that the schedule asks for at this step."""
        return sparsity_at(self.schedule, self.step)

    def grad_scale(self, device: torch.device) -> float | Tensor:
        """Gradient scale at this step; a 0-dim tensor on ``device`` where steps are counted on a device."""
        if self.device_schedule is None:
            return self.scale_at(self.sparsity)
        return self.device_schedule.grad_scale().to(device)

    def independent(self) -> SchedulePosition:
        """A position of its own, at the same step of the same schedule."""
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


def select_at(position: SchedulePosition, policy: Policy, parameters: Sequence[Tensor]) -> Tensor:
    """(L,) thresholds of the weights at a position of the schedule; 0 for weights without data (meta device)."""
    first = parameters[0]
    devices = {parameter.device for parameter in parameters}
    if len(devices) > 1:
        raise ValueError(f"the prunable weights must be on one device, got {sorted(map(str, devices))}")
    if first.device.type == "meta":
        return policy.no_thresholds(first)
    if position.device_schedule is not None:
        ranks, fractions = position.device_schedule.positions()
        return policy.thresholds(parameters, ranks.to(first.device), fractions.to(first.device))
    return policy.thresholds_at(list(parameters), position.sparsity)
