"""How figures are taken: CUDA events with a cold L2 cache, variants in interleaved rounds."""

from __future__ import annotations

import gc
import random
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

Figures = dict[str, float]  # e.g. {"seconds": 1e-4}
Meter = Callable[[Callable[[], object]], Figures]  # runs a function and says what that took
Result = TypeVar("Result")

HOST_RUNS = 30  # of a function whose host time is measured


class Run(NamedTuple):
    """What ``run`` returned, and how long it took in seconds."""

    result: Any
    seconds: float


class CudaClock:
    """Time between two events on the current stream, with a cold L2 cache; memory of torch's allocator."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        self._flush = torch.empty(2 * cache, dtype=torch.uint8, device=device)

    def time(self, run: Callable[[], Any]) -> Run:
        """Time on the device from before the first kernel's launch to the last kernel's end."""
        with torch.cuda.device(self.device):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._flush.zero_()  # also keeps the device busy while the first kernel is launched
            start.record()
            result = run()
            end.record()
            end.synchronize()
        return Run(result, start.elapsed_time(end) / 1e3)

    def peak_memory(self, run: Callable[[], Any]) -> tuple[Run, int | None]:
        """Growth of the memory that torch's allocator has handed out."""
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        done = self.time(run)
        return done, torch.cuda.max_memory_allocated(self.device) - before


def event_meter(device: torch.device) -> Meter:
    """Seconds on the device, by a ``CudaClock``."""
    clock = CudaClock(device)
    return lambda run: {"seconds": clock.time(run).seconds}


def host_meter(device: torch.device) -> Meter:
    """Seconds of the host until all is launched; for work so small that the device never lags behind."""

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
    """What the runs returned: in each round those that are due run once, in random order, without garbage collection.

    A slow spell of the machine then hits all of them. ``counts`` says how many of the ``rounds`` each takes part in.
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
    """Whether a variant with ``count`` runs, spread evenly over the rounds, runs in round ``index``."""
    return (index + 1) * count // rounds > index * count // rounds


def spread(found: Sequence[Figures], divisor: float = 1.0) -> dict[str, dict[str, float]]:
    """Median, 20th and 80th percentile of each figure, divided by ``divisor``."""
    at = {"median": 0.5, "p20": 0.2, "p80": 0.8}
    spreads = {}
    for name in found[0]:
        ordered = sorted(figures[name] / divisor for figures in found)
        spreads[name] = {key: ordered[round(q * (len(ordered) - 1))] for key, q in at.items()}
    return spreads
