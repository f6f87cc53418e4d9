"""What a benchmark is made of: a case has trials, a trial has inputs and variants that do the same work on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch


class Setting(NamedTuple):
    """What the trials of a case are made for."""

    device: torch.device
    smoke: bool = False  # tiny inputs and few rounds: it shows that everything runs and measures nothing

    def rounds(self, full: int) -> int:
        """``full``, or one round for a smoke run."""
        return 1 if self.smoke else full


class Figure(NamedTuple):
    """A number with its unit, e.g. (2, "count") or (1e6, "B")."""

    value: float
    unit: str


Gate = Callable[[Any], str | None]


def accept(_: Any) -> None:
    """The gate of limits, which are torch's own ops."""


@dataclass(frozen=True)
class Variant:
    """One way of doing a trial's work.

    Attributes:
        run: what is timed. Its result goes to the gate, and is dropped after the clock has stopped.
        moved: bytes that must be read and written at least, all calls of ``run`` together.
        gate: judges a result of ``run``: None if it is right, else what is wrong.
        before: run before every ``run``, untimed, e.g. to restore what it overwrites.
        calls: number of calls that ``run`` makes; times are per call.
        self_timed: ``run`` returns its own time in seconds (of something in another process).
        figures: further figures, by the name of their metric.
    """

    run: Callable[[], Any]
    moved: int
    gate: Gate
    before: Callable[[], object] = lambda: None
    calls: int = 1
    self_timed: bool = False
    figures: Mapping[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True)
class Trial:
    """Variants that are compared on one input, in interleaved rounds.

    Attributes:
        operation: what is done, e.g. "float32, p = 3".
        input: on which data, e.g. "heavy-tailed".
        sparsity: fraction of zeros, or None where it has no meaning.
        prepare: makes the data; called once, when the trial begins.
        variants: name -> makes the variant from the data. A buffer that the variants share is poisoned by the maker.
        limit: name of the variant that the others' times are divided by.
        rounds: how often a variant is timed at most; 0 where only its further figures count.
        seconds: time for each variant; slow ones get fewer rounds, but at least three.
        grad: run in grad mode; most trials are of what optimizers and backward passes call, which run without.
    """

    operation: str
    input: str
    sparsity: float | None
    prepare: Callable[[], Any]
    variants: Mapping[str, Callable[[Any], Variant]]
    limit: str
    rounds: int = 30
    seconds: float = 2.0
    grad: bool = False

    @property
    def title(self) -> str:
        """Operation, input and sparsity in one line."""
        sparsity = "" if self.sparsity is None else f", sparsity {self.sparsity}"
        return f"{self.operation}; {self.input}{sparsity}" if self.input else f"{self.operation}{sparsity}"


@dataclass(frozen=True)
class Case:
    """A subject with its trials for a setting; nothing is computed until a trial is prepared."""

    name: str
    trials: Callable[[Setting], Iterable[Trial]]
