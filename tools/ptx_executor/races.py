"""Data races by a shadow of memory: who wrote and who read each granule last, and before which barrier.

A thread is one integer: program << 12 | warp << 6 | lane. Several readers share a granule as "any lane of this warp",
"any warp of this program" or "any program". Two accesses are ordered when a barrier of the program (or, inside a warp,
``bar.warp.sync``) lies between them; nothing orders two programs of one launch.
"""

from __future__ import annotations

import numpy as np

from tools.ptx_executor.scalar_types import Array

NOBODY, MANY_PROGRAMS = -1, -2
ANY_LANE, ANY_WARP_AND_LANE = 63, 0xFFF
WARP_EPOCH_BITS = 32  # epochs are program barriers << 32 | warp barriers


class RaceShadow:
    """The shadow of ``size`` bytes, one entry per ``granule`` bytes (the narrowest access of the kernel)."""

    def __init__(self, size: int, granule: int) -> None:
        count = size // granule + 1
        self.granule = granule
        self.writer = np.full(count, NOBODY, np.int64)
        self.writer_epoch = np.zeros(count, np.int64)
        self.writer_atomic = np.zeros(count, bool)
        self.reader = np.full(count, NOBODY, np.int64)
        self.reader_epoch = np.zeros(count, np.int64)

    def granules(self, positions: Array, size: int) -> list[Array]:
        """The entries that an access of ``size`` bytes at byte ``positions`` covers."""
        first = positions // self.granule
        return [first + i for i in range(max(1, size // self.granule))]

    def read(self, entries: Array, threads: Array, epochs: Array, *, atomic: bool) -> Array:
        """Record reads; returns the conflicting thread of each access, or NOBODY."""
        conflict = _concurrent(self.writer[entries], self.writer_epoch[entries], threads, epochs)
        if atomic:
            return np.where(conflict & ~self.writer_atomic[entries], self.writer[entries], NOBODY)
        before, before_epoch = self.reader[entries], self.reader_epoch[entries]
        live = _concurrent(before, before_epoch, threads, epochs)
        self.reader[entries] = np.where(live, _merge(before, threads), threads)
        self.reader_epoch[entries] = epochs
        shared = self.reader[entries]
        crowded = shared != threads
        if crowded.any():  # several lanes of this very instruction, or earlier readers
            for _ in range(2):  # lanes first, then warps and programs
                entry, mine = entries[crowded], threads[crowded]
                self.reader[entry] = _merge(self.reader[entry], mine)
        return np.where(conflict, self.writer[entries], NOBODY)

    def write(self, entries: Array, threads: Array, epochs: Array, *, atomic: bool, unchanged: Array | None) -> Array:
        """Record writes; returns the conflicting thread of each access, or NOBODY.

        Storing the value that is there already (``unchanged``) conflicts with nobody: Triton replicates such stores.
        """
        writer, reader = self.writer[entries], self.reader[entries]
        by_writer = _concurrent(writer, self.writer_epoch[entries], threads, epochs)
        by_writer &= ~(self.writer_atomic[entries] & atomic)
        by_reader = _concurrent(reader, self.reader_epoch[entries], threads, epochs)
        if unchanged is not None:
            by_writer, by_reader = by_writer & ~unchanged, by_reader & ~unchanged
        self.writer[entries] = threads
        self.writer_epoch[entries] = epochs
        self.writer_atomic[entries] = atomic
        return np.where(by_writer, writer, np.where(by_reader, reader, NOBODY))


def describe(thread: int) -> str:
    """A shadow's thread in words."""
    if thread == MANY_PROGRAMS:
        return "several programs"
    program, warp, lane = thread >> 12, thread >> 6 & 63, thread & 63
    if thread & ANY_WARP_AND_LANE == ANY_WARP_AND_LANE:
        return f"several warps of program {program}"
    return f"program {program} " + (f"several threads of warp {warp}" if lane == 63 else f"thread {warp * 32 + lane}")


def _concurrent(before: Array, before_epoch: Array, threads: Array, epochs: Array) -> Array:
    """Whether the access in the shadow belongs to another thread and is not ordered before this one."""
    other = (before != NOBODY) & (before != threads)
    if not other.any():
        return other
    same_program = before >> 12 == threads >> 12
    same_warp = same_program & (before >> 6 == threads >> 6)
    barrier_between = before_epoch >> WARP_EPOCH_BITS != epochs >> WARP_EPOCH_BITS
    warp_barrier_between = before_epoch != epochs
    return other & ~(same_program & barrier_between) & ~(same_warp & warp_barrier_between)


def _merge(a: Array, b: Array) -> Array:
    """The smallest group of threads that holds both."""
    same_program = (a >> 12 == b >> 12) & (a != MANY_PROGRAMS)
    same_warp = same_program & (a >> 6 == b >> 6)
    group = np.where(same_warp, b | ANY_LANE, np.where(same_program, b | ANY_WARP_AND_LANE, MANY_PROGRAMS))
    return np.where(a == b, a, group)
