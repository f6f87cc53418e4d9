"""Measures time: with CUDA events and a cold L2 cache, and with the variants in interleaved rounds."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

Figures = dict[str, float]  # e.g. {"seconds": 1e-4}
Meter = Callable[[Callable[[], object]], Figures]  # runs a function and returns what it cost
Result = TypeVar("Result")

HOST_RUNS = 30  # in one measurement of host time


class Run(NamedTuple):
    """The result of a function, and how long it took in seconds."""

    result: Any
    seconds: float


class CudaClock:
    """Measures the time between two events on the current stream, with a cold L2 cache, and memory."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * cache, dtype=torch.uint8, device=device)

    def time(self, run: Callable[[], Any]) -> Run:
        """Run a function and measure the device from before its first kernel to the end of its last."""
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()  # also keeps the device busy while the first kernel is launched
            start.record()
            result = run()
            end.record()
            end.synchronize()
        return Run(result, start.elapsed_time(end) / 1e3)

    def peak_memory(self, run: Callable[[], Any]) -> tuple[Run, int | None]:
        """Run a function, and also measure by how many bytes the memory of torch's allocator grew at its peak."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        done = self.time(run)
        return done, torch.cuda.max_memory_allocated(self.device) - before


def event_meter(device: torch.device) -> Meter:
    """A meter of seconds on the device, by a ``CudaClock``."""
    clock = CudaClock(device)
    return lambda run: {"seconds": clock.time(run).seconds}


def host_meter(device: torch.device) -> Meter:
    """A meter of seconds that the host takes to launch all work, which must be so small that the device keeps up."""

    def measure(run: Callable[[], object]) -> Figures:
        torch.cuda.synchronize(device)
        begin = time.perf_counter()
        for _ in range(HOST_RUNS):
            run()
        seconds = (time.perf_counter() - begin) / HOST_RUNS
        torch.cuda.synchronize(device)
        return {"seconds": seconds}

    return measure


def interleaved(
    runs: Mapping[str, Callable[[], Result]], counts: Mapping[str, int], rounds: int, seed: int = 0
) -> dict[str, list[Result]]:
    """Run variants in rounds, in random order and without garbage collection, so that a slow spell hits all of them.

    Args:
        runs: the variants, by name.
        counts: the number of rounds in which each variant runs, spread evenly.
        rounds: the number of all rounds.
        seed: of the order.

    Returns:
        The results of each variant, in the order of its runs.
    """
    found: dict[str, list[Result]] = {name: [] for name in runs}
    order = random.Random(seed)
    gc.collect()
    gc.disable()
    try:
        for index in range(rounds):
            due = [name for name in runs if is_due(index, counts[name], rounds)]
            order.shuffle(due)
            for name in due:
                found[name].append(runs[name]())
    finally:
        gc.enable()
    return found


def is_due(index: int, count: int, rounds: int) -> bool:
    """Whether a variant with ``count`` runs, spread evenly over all rounds, runs in round ``index``."""
    return (index + 1) * count // rounds > index * count // rounds


def spread(found: Sequence[Figures], divisor: float = 1.0) -> dict[str, dict[str, float]]:
    """The median and the 20th and 80th percentiles of each figure, divided by ``divisor``."""
    at = {"median": 0.5, "p20": 0.2, "p80": 0.8}
    spreads = {}
    for name in found[0]:
        ordered = sorted(figures[name] / divisor for figures in found)
        spreads[name] = {key: ordered[round(q * (len(ordered) - 1))] for key, q in at.items()}
    return spreads
