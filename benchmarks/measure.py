"""The measurement of a trial: every variant through its gate, then interleaved rounds of those that passed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial

import torch

from benchmarks.case import Figure, Trial, Variant
from benchmarks.clock import Clock
from feather_kernels.cli.gpu_report.clock import interleaved

FEWEST_ROUNDS = 3
SLOW = 1.0  # seconds; a run that takes longer is not repeated for a better figure of its memory


@dataclass
class Outcome:
    """What was found out about one variant of a trial.

    Attributes:
        failure: why the variant was not timed: what its gate, or the exception that it raised, said.
        moved: bytes per call that must move.
        peak_memory: bytes beyond those of the inputs, or None where they cannot be measured.
        figures: those of the variant.
        times: seconds per call, one entry per round.
    """

    variant: str
    failure: str | None = None
    moved: float = 0.0
    peak_memory: int | None = None
    figures: Mapping[str, Figure] = field(default_factory=dict)
    times: list[float] = field(default_factory=list)


def measure(trial: Trial, clock: Clock, seed: int = 0) -> list[Outcome]:
    """Check and time the variants of a trial; in each round those that are due run once, in random order."""
    with torch.set_grad_enabled(trial.grad):
        return _measure(trial, clock, seed)


def _measure(trial: Trial, clock: Clock, seed: int) -> list[Outcome]:
    data = trial.prepare()
    ready: dict[str, Variant] = {}
    seconds: dict[str, float] = {}
    outcomes = {name: Outcome(name) for name in trial.variants}
    for name, make in trial.variants.items():
        outcome = outcomes[name]
        try:
            variant = make(data)
            if trial.rounds:
                taken = pass_gate(variant, clock, outcome)
            else:
                outcome.figures, outcome.failure = variant.figures, variant.gate(variant.run())
        except Exception as error:  # a peer that cannot run here must not stop the others
            outcome.failure = f"{type(error).__name__}: {error}"
            continue
        if outcome.failure is None and trial.rounds:
            ready[name], seconds[name] = variant, taken
        del variant  # with all that it holds
    counts = count_rounds(seconds, trial)
    runs = {name: partial(run_once, variant, clock) for name, variant in ready.items()}
    for name, times in interleaved(runs, counts, trial.rounds, seed).items():
        outcomes[name].times = times
    return list(outcomes.values())


def pass_gate(variant: Variant, clock: Clock, outcome: Outcome) -> float:
    """Run, judge the result, and note the peak memory of a warm run; returns the wall time of a run in seconds."""
    variant.before()
    outcome.figures = variant.figures
    (result, seconds), outcome.peak_memory = clock.peak_memory(variant.run)
    outcome.failure = variant.gate(result)
    outcome.moved = variant.moved / variant.calls
    del result
    if outcome.failure is None and seconds < SLOW:
        variant.before()
        (_, seconds), outcome.peak_memory = clock.peak_memory(variant.run)
    return seconds


def run_once(variant: Variant, clock: Clock) -> float:
    """Seconds per call."""
    variant.before()
    done = clock.time(variant.run)
    return float(done.result) if variant.self_timed else done.seconds / variant.calls


def count_rounds(seconds: Mapping[str, float], trial: Trial) -> dict[str, int]:
    """Rounds of each variant, by the seconds of a run; those about as fast as the limit take part in the same ones."""
    counts = {name: rounds_for(taken, trial.rounds, trial.seconds) for name, taken in seconds.items()}
    close = [name for name, taken in seconds.items() if taken <= 2 * seconds.get(trial.limit, 0.0)]
    shared = max((counts[name] for name in close), default=0)
    return {**counts, **dict.fromkeys(close, shared)}


def rounds_for(seconds: float, rounds: int, budget: float) -> int:
    """How many of the ``rounds`` a variant takes part in whose run takes so many seconds."""
    affordable = int(budget / seconds) if seconds > 0 else rounds
    return min(rounds, max(FEWEST_ROUNDS, affordable))
