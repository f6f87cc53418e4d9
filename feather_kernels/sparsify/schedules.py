"""Sparsity schedules: the fraction of zeros at each optimizer step, counted from 0."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from feather_kernels.checks import check_number, check_sparsity
from feather_kernels.user_warnings import warn_user

__all__ = ["ConstantSchedule", "CubicSchedule", "LambdaSchedule", "Schedule"]


class Schedule(Protocol):
    """The interface of schedules: any object with a method ``sparsity_at(step)``.

    It may also have an attribute ``final_sparsity``, which ``grad_scale="auto"`` and overrides of the sparsity need,
    and ``end_step``, the step after which the sparsity no longer changes.

    Example:
        >>> class StepSchedule:
        ...     final_sparsity = 0.9
        ...     end_step = 200
        ...     def sparsity_at(self, step):
        ...         return (0.0, 0.5, 0.9)[min(step // 100, 2)]
        >>> sparsifier = fk.Sparsifier(nn.Linear(8, 4), schedule=StepSchedule())
        >>> sparsifier.schedule.sparsity_at(150)
        0.5
    """

    def sparsity_at(self, step: int) -> float:
        """The sparsity in [0, 1) at a step.

        Args:
            step: number of optimizer steps so far.
        """


@dataclass(frozen=True)
class CubicSchedule:
    """Cubic ramp (Zhu & Gupta 2017; Feather): fast at first, slow towards the end.

    ``s(t) = 0`` for ``t < t1``; ``s(t) = s_i + (s_f - s_i) (1 - (1 - (t - t1) / (t2 - t1))^power)`` for
    ``t1 <= t < t2``; ``s(t) = s_f`` for ``t >= t2``.

    Args:
        final_sparsity: s_f, in [0, 1).
        begin_step: t1, the step at which the ramp begins, at least 0.
        end_step: t2, the step at which the ramp ends, at least ``begin_step``.
        initial_sparsity: s_i, in [0, 1).
        power: exponent of the ramp, above 0; 3 makes it cubic.

    Raises:
        ValueError, TypeError: an argument is out of range or has the wrong type.

    Example:
        >>> schedule = fk.CubicSchedule(final_sparsity=0.8, begin_step=0, end_step=100)
        >>> [round(schedule.sparsity_at(step), 3) for step in (0, 25, 50, 100, 200)]
        [0.0, 0.463, 0.7, 0.8, 0.8]
    """

    final_sparsity: float
    begin_step: int
    end_step: int
    initial_sparsity: float = 0.0
    power: float = 3

    def __post_init__(self) -> None:
        check_sparsity("final_sparsity", self.final_sparsity)
        check_sparsity("initial_sparsity", self.initial_sparsity)
        check_number("begin_step", self.begin_step, numbers.Integral)
        check_number("end_step", self.end_step, numbers.Integral)
        check_number("power", self.power)
        if self.begin_step < 0:
            raise ValueError(f"begin_step must be at least 0, got {self.begin_step}")
        if self.end_step < self.begin_step:
            raise ValueError(f"end_step must not be before begin_step ({self.begin_step}), got {self.end_step}")
        if not self.power > 0:
            raise ValueError(f"power must be positive, got {self.power}")

    def sparsity_at(self, step: int) -> float:
        """The sparsity at a step.

        Args:
            step: number of optimizer steps so far.
        """
        if step < self.begin_step:
            return 0.0
        if step >= self.end_step:
            return self.final_sparsity
        remaining = 1 - (step - self.begin_step) / (self.end_step - self.begin_step)
        return self.initial_sparsity + (self.final_sparsity - self.initial_sparsity) * (1 - remaining**self.power)


@dataclass(frozen=True)
class ConstantSchedule:
    """The same sparsity at every step.

    Args:
        final_sparsity: the sparsity, in [0, 1).

    Raises:
        ValueError, TypeError: ``final_sparsity`` is out of range or no number.

    Example:
        >>> fk.ConstantSchedule(0.9).sparsity_at(0)
        0.9
    """

    final_sparsity: float

    def __post_init__(self) -> None:
        check_sparsity("final_sparsity", self.final_sparsity)

    def sparsity_at(self, step: int) -> float:  # noqa: ARG002
        """The sparsity at a step.

        Args:
            step: number of optimizer steps so far; makes no difference.
        """
        return self.final_sparsity


@dataclass(frozen=True)
class LambdaSchedule:
    """A schedule that a function defines.

    Args:
        function: returns the sparsity at a step.
        final_sparsity: the sparsity at the end, which ``grad_scale="auto"`` and overrides of the sparsity need.

    Raises:
        ValueError, TypeError: ``function`` is no function, or ``final_sparsity`` is out of range.

    Example:
        >>> schedule = fk.LambdaSchedule(lambda step: min(0.9, 0.01 * step), final_sparsity=0.9)
        >>> schedule.sparsity_at(50)
        0.5
    """

    function: Callable[[int], float] = field(repr=False)  # its repr would differ from process to process
    final_sparsity: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function must be a function of the step, got {self.function!r}")
        if self.final_sparsity is not None:
            check_sparsity("final_sparsity", self.final_sparsity)

    def sparsity_at(self, step: int) -> float:
        """The sparsity at a step, as the function returns it.

        Args:
            step: number of optimizer steps so far.
        """
        return self.function(step)


def make_schedule(sparsity: float | None, total_steps: int | None, schedule: Schedule | None) -> Schedule:
    """The given schedule, or the default one: a cubic ramp from step 0 to half of ``total_steps``.

    Warns:
        SparsityWarning: the schedule does not reach its final sparsity in ``total_steps``.

    Raises:
        ValueError: neither a schedule nor the arguments of the default one are given, or both are.
        TypeError: an argument has the wrong type.
    """
    if total_steps is not None:
        check_number("total_steps", total_steps, numbers.Integral)
        if total_steps <= 0:
            raise ValueError(f"total_steps must be positive, got {total_steps}")
    if callable(getattr(sparsity, "sparsity_at", None)):
        raise TypeError(f"sparsity must be a number, got {sparsity}: pass a schedule by keyword, schedule=...")
    if schedule is None:
        if sparsity is None or total_steps is None:
            raise ValueError(f"give sparsity and total_steps, or give schedule; got {sparsity=}, {total_steps=}")
        check_sparsity("sparsity", sparsity)
        return CubicSchedule(sparsity, 0, total_steps // 2)
    if sparsity is not None:
        raise ValueError(f"give sparsity or schedule, not both; got {sparsity=}, {schedule=}")
    if not callable(getattr(schedule, "sparsity_at", None)):
        raise TypeError(f"schedule must have a method sparsity_at(step), got {schedule!r}")
    final = final_sparsity(schedule)
    if total_steps is not None and final is not None and schedule.sparsity_at(total_steps) < final:
        reached = schedule.sparsity_at(total_steps)
        warn_user(f"{schedule} reaches sparsity {reached:.4f} in total_steps={total_steps}, not the final {final:.4f}")
    return schedule


def final_sparsity(schedule: Schedule) -> float | None:
    """The sparsity at the end of the schedule, or None if the schedule has no such attribute."""
    return getattr(schedule, "final_sparsity", None)


def sparsity_at(schedule: Schedule, step: int) -> float:
    """The schedule's sparsity at a step; raises ValueError or TypeError unless it is in [0, 1)."""
    sparsity = schedule.sparsity_at(step)
    check_sparsity(f"the schedule's sparsity at step {step}", sparsity)
    return sparsity


def last_step(schedule: Schedule, total_steps: int | None) -> int:
    """The step after which the schedule's sparsity no longer changes: ``end_step`` of the schedule, or ``total_steps``.

    Raises:
        ValueError: the schedule has no ``end_step``, and ``total_steps`` is None.
    """
    if isinstance(schedule, ConstantSchedule):
        return 0
    end = getattr(schedule, "end_step", total_steps)
    if end is None:
        raise ValueError(f"total_steps must be given with capturable=True and a schedule without end_step, {schedule}")
    return int(end)
