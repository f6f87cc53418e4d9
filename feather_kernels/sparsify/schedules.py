"""Sparsity schedules: the fraction of zeros wanted at each optimizer step, counted from 0."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from feather_kernels.checks import check_number, check_sparsity
from feather_kernels.user_code import warn_user

__all__ = ["ConstantSchedule", "CubicSchedule", "LambdaSchedule", "Schedule"]


class Schedule(Protocol):
    """Anything with ``sparsity_at(step)`` in [0, 1); it may also have ``final_sparsity`` and ``end_step``."""

    def sparsity_at(self, step: int) -> float:
        """Sparsity wanted at ``step``, after that many optimizer steps."""


@dataclass(frozen=True)
class CubicSchedule:
    """Cubic ramp (Zhu & Gupta 2017; Feather): fast at first, slow towards the end.

    ``s(t) = 0`` before ``begin_step``; ``s_i + (s_f - s_i) (1 - (1 - (t - t1) / (t2 - t1))^power)`` from
    t1 = begin_step to t2 = end_step; ``s_f`` from then on. s_i is initial_sparsity, s_f final_sparsity.
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
        """Sparsity wanted after ``step`` optimizer steps."""
        if step < self.begin_step:
            return 0.0
        if step >= self.end_step:
            return self.final_sparsity
        remaining = 1 - (step - self.begin_step) / (self.end_step - self.begin_step)
        return self.initial_sparsity + (self.final_sparsity - self.initial_sparsity) * (1 - remaining**self.power)


@dataclass(frozen=True)
class ConstantSchedule:
    """The same sparsity at every step."""

    final_sparsity: float

    def __post_init__(self) -> None:
        check_sparsity("final_sparsity", self.final_sparsity)

    def sparsity_at(self, step: int) -> float:  # noqa: ARG002
        """``final_sparsity``."""
        return self.final_sparsity


@dataclass(frozen=True)
class LambdaSchedule:
    """``function(step)``; state ``final_sparsity`` where something depends on it (grad_scale "auto")."""

    function: Callable[[int], float] = field(repr=False)  # its repr would differ from process to process
    final_sparsity: float | None = None

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"function must be a function of the step, got {self.function!r}")
        if self.final_sparsity is not None:
            check_sparsity("final_sparsity", self.final_sparsity)

    def sparsity_at(self, step: int) -> float:
        """What the function returns."""
        return self.function(step)


def make_schedule(sparsity: float | None, total_steps: int | None, schedule: Schedule | None) -> Schedule:
    """The schedule given, or the default one: cubic, from step 0 to half of ``total_steps``.

    Raises:
        ValueError: too little or too much is given. A schedule that does not arrive in ``total_steps`` is warned about.
    """
    if total_steps is not None:
        check_number("total_steps", total_steps, numbers.Integral)
        if total_steps <= 0:
            raise ValueError(f"total_steps must be positive, got {total_steps}")
    if callable(getattr(sparsity, "sparsity_at", None)):
        raise TypeError(f"sparsity must be a number, got {sparsity}: pass a schedule by name, schedule=...")
    if schedule is None:
        if sparsity is None or total_steps is None:
            raise ValueError(f"give sparsity and total_steps, or schedule; got {sparsity=}, {total_steps=}")
        check_sparsity("sparsity", sparsity)
        return CubicSchedule(sparsity, 0, total_steps // 2)
    if sparsity is not None:
        raise ValueError(f"give either sparsity or schedule, got both: {sparsity} and {schedule}")
    if not callable(getattr(schedule, "sparsity_at", None)):
        raise TypeError(f"schedule must have a method sparsity_at(step), got {schedule!r}")
    final = final_sparsity(schedule)
    if total_steps is not None and final is not None and schedule.sparsity_at(total_steps) < final:
        reached = schedule.sparsity_at(total_steps)
        warn_user(f"{schedule} reaches {reached:.4f} of {final:.4f} in {total_steps} steps")
    return schedule


def final_sparsity(schedule: Schedule) -> float | None:
    """Sparsity at the end of the schedule, or None if it does not tell."""
    return getattr(schedule, "final_sparsity", None)


def sparsity_at(schedule: Schedule, step: int) -> float:
    """The schedule's sparsity at ``step``, checked to be in [0, 1)."""
    sparsity = schedule.sparsity_at(step)
    check_sparsity(f"the schedule's sparsity at step {step}", sparsity)
    return sparsity


def last_step(schedule: Schedule, total_steps: int | None) -> int:
    """The step from which on the schedule's sparsity stays; ``total_steps`` where the schedule does not tell.

    Raises:
        ValueError: neither tells.
    """
    if isinstance(schedule, ConstantSchedule):
        return 0
    end = getattr(schedule, "end_step", total_steps)
    if end is None:
        raise ValueError(f"total_steps must be given with capturable and a schedule without end_step, {schedule}")
    return int(end)
