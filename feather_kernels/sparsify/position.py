"""Where in its schedule a training stands."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from feather_kernels.sparsify.device_schedule import DeviceSchedule
from feather_kernels.sparsify.options import ConstantScale
from feather_kernels.sparsify.schedules import ConstantSchedule, Schedule, sparsity_at


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
        self._step = 0

    def advance(self) -> None:
        """One optimizer step further."""
        self._step += 1
        if self.device_schedule is not None:
            self.device_schedule.advance()

    def move_to(self, step: int) -> None:
        """Continue from ``step``."""
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

    def grad_scale(self) -> float | Tensor:
        """Gradient scale at this step."""
        return self.scale_at(self.sparsity) if self.device_schedule is None else self.device_schedule.now()[2]

    def __deepcopy__(self, memo: dict[int, Any]) -> SchedulePosition:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        sparsity = self.sparsity
        return _fixed, (self.step, sparsity, self.scale_at(sparsity))


def _fixed(step: int, sparsity: float, grad_scale: float) -> SchedulePosition:
    position = SchedulePosition(ConstantSchedule(sparsity), ConstantScale(grad_scale))
    position.move_to(step)
    return position
