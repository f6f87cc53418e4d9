"""Runs a kernel: all threads of many programs at once, one program counter per thread.

The threads at the lowest program counter run on (so that divergent branches meet again at the first label they
share); now and then a random counter is taken instead, so that no spinning thread starves the one that it waits for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tools.ptx_executor import parsing as p
from tools.ptx_executor.errors import BarrierDeadlockError, ConvergenceError, EndlessLoopError, UnknownInstructionError
from tools.ptx_executor.instructions import Rule, link
from tools.ptx_executor.instructions.control import BRANCHES, is_barrier, is_for_warp, mask_operand
from tools.ptx_executor.lanes import WARP_SIZE, Geometry, Lanes, Threads
from tools.ptx_executor.memory import GlobalMemory, SharedMemory
from tools.ptx_executor.scalar_types import Array, bits

MAX_THREADS_AT_ONCE = 1 << 15
MAX_STEPS = 2_000_000
MEMORY_OPCODES = frozenset({"ld", "st", "atom", "red", "ldmatrix", "stmatrix", "cp"})
OTHER_SPACES = frozenset({"param", "shared", "local", "const"})  # than global memory, for loads and stores
LOADS_STORES, ATOMICS = ("ld", "st"), ("atom", "red")
RANDOM_EVERY = 256  # steps
ALL_LANES = (1 << WARP_SIZE) - 1
RUNNING, EXITED = -1, -2  # states of a thread; otherwise the number of the barrier at which it waits


@dataclass(frozen=True)
class Options:
    """``races``: report data races; ``noise``: approximate instructions err as PTX allows; ``seed``: of all chance."""

    races: bool = True
    noise: bool = False
    seed: int = 0


@dataclass
class LaunchReport:
    """What the threads of a launch did: bytes of global memory (see GlobalMemory), executed instructions of each.

    executed: the places of the code where any thread was, its guard true or not.
    """

    kernel: str
    grid: tuple[int, int, int]
    threads: int
    bytes_read: int = 0
    bytes_written: int = 0
    instructions: Counter[str] = field(default_factory=Counter)
    executed: set[int] = field(default_factory=set)

    @property
    def narrow_accesses(self) -> int:
        """Loads from and stores to global memory of less than 16 bytes, per thread."""
        return sum(count for name, count in self.instructions.items() if 0 < _global_bits(name, LOADS_STORES) < 128)

    @property
    def global_atomics(self) -> int:
        """Atomic updates of global memory, per thread."""
        return sum(count for name, count in self.instructions.items() if _global_bits(name, ATOMICS))


class Program:
    """A parsed kernel with the rule of each of its instructions. Raises UnknownInstructionError on what is unknown."""

    def __init__(self, text: str, name: str | None = None) -> None:
        self.kernel = p.parse(text, name)
        self.rules: list[Rule] = link(self.kernel)
        self.joins = frozenset(self.kernel.labels.values())
        self.constants = {name: np.frombuffer(data, np.uint8).copy() for name, data in self.kernel.constants.items()}
        self.granule = {space: self._granule(space) for space in ("global", "shared")}

    def _granule(self, space: str) -> int:
        """Bytes of the narrowest access to a state space: the grain of its race shadow."""
        widths = [
            bits(ins.type) // 8 if ins.types else 4
            for ins in self.kernel.instructions
            if ins.opcode in MEMORY_OPCODES and "param" not in ins.modifiers
            if ins.opcode == "cp" or ("shared" in ins.modifiers) == (space == "shared")
        ]
        return min(widths, default=4)

    def launch(
        self,
        grid: Sequence[int],
        block: Sequence[int],
        arguments: bytes,
        extents: Sequence[tuple[int, int]],
        dynamic_shared: int = 0,
        options: Options = Options(),
    ) -> LaunchReport:
        """Run every program of ``grid``.

        Args:
            grid: programs along up to three axes.
            block: threads of a program along up to three axes; whole warps.
            arguments: the parameters as the kernel lays them out, zero-padded here when short.
            extents: (address, bytes) of every tensor that the kernel may touch.
            dynamic_shared: bytes of shared memory beyond the declared ones.
            options: checks, noise and seed.
        """
        grid3, block3 = _three(grid), _three(block)
        total, threads_each = int(np.prod(grid3, dtype=np.int64)), int(np.prod(block3))
        report = LaunchReport(self.kernel.name, grid3, total * threads_each)
        symbols, declared = self._layout()
        constants = [(array.ctypes.data, array.nbytes) for array in self.constants.values()]
        memory = GlobalMemory([*extents, *constants], self.granule["global"] if options.races else None)
        shared_granule = self.granule["shared"] if options.races else None
        needed = max((parameter.offset + parameter.size for parameter in self.kernel.parameters), default=0)
        rng = np.random.default_rng(options.seed)
        chunk = max(1, MAX_THREADS_AT_ONCE // threads_each)
        for first in range(0, total, chunk):
            programs = np.arange(first, min(total, first + chunk))
            shared = SharedMemory(declared + dynamic_shared, len(programs), shared_granule)
            geometry = Geometry(grid3, block3, programs)
            threads = Threads(
                self.kernel, geometry, arguments.ljust(needed, b"\0"), memory, shared, symbols, rng, options.noise
            )
            with np.errstate(all="ignore"):
                _Run(self, threads, report).run()
        report.bytes_read, report.bytes_written = memory.bytes_read, memory.bytes_written
        return report

    def _layout(self) -> tuple[dict[str, int], int]:
        """Addresses of the shared variables and the constants, and the bytes of the declared shared ones."""
        symbols = {name: array.ctypes.data for name, array in self.constants.items()}
        end = 0
        for name, variable in sorted(self.kernel.shared.items(), key=lambda item: item[1].size == 0):
            symbols[name] = -(-end // variable.alignment) * variable.alignment
            end = symbols[name] + variable.size
        return symbols, end


class _Run:
    """The scheduler of one chunk."""

    def __init__(self, program: Program, threads: Threads, report: LaunchReport) -> None:
        self.program, self.threads, self.report = program, threads, report
        self.code = program.kernel.instructions
        self.counter = np.zeros(threads.count, np.int64)
        self.state = np.full(threads.count, RUNNING, np.int64)
        self.expected = np.full(threads.count, threads.geometry.block_threads, np.int64)
        self.waiting = np.zeros(threads.count, bool)  # at a warp instruction, for other lanes of its mask

    def run(self) -> None:
        for step in range(MAX_STEPS):
            running = self.state == RUNNING
            if not running.any():
                if (self.state == EXITED).all():
                    return
                self._deadlock()
            ready = running & ~self.waiting
            if not ready.any():
                self._go_on()
                continue
            counters = self.counter[ready]
            chosen = int(counters.min() if step % RANDOM_EVERY else self.threads.rng.choice(counters))
            selected = ready & (self.counter == chosen)
            self._advance(chosen, None if selected.all() else np.nonzero(selected)[0])
        raise EndlessLoopError(f"kernel {self.program.kernel.name}: more than {MAX_STEPS} steps")

    def _go_on(self) -> None:
        """All lanes that run wait for others of their masks: those go on for whom the last missing ones have exited."""
        for counter in map(int, np.unique(self.counter[self.waiting])):
            index = self._gather(self.code[counter], counter, np.nonzero(self.waiting & (self.counter == counter))[0])
            if len(index):
                return self._advance(counter, index, gathered=True)
        counter = int(self.counter[self.waiting].min())
        lanes = Lanes(self.threads, self.code[counter], np.nonzero(self.waiting & (self.counter == counter))[0])
        raise lanes.fault(ConvergenceError, "waits for lanes of its mask that never come", 0)

    def _advance(self, counter: int, index: Array | None, gathered: bool = False) -> None:
        """Run the threads ``index`` from ``counter`` to the next branch, barrier or label."""
        while counter < len(self.code):
            ins = self.code[counter]
            if index is not None and not gathered and is_for_warp(ins):
                index = self._gather(ins, counter, index)
                if not len(index):
                    return
            gathered = False
            lanes = self._lanes(ins, index)
            self.report.executed.add(counter)
            counter += 1
            self.report.instructions[ins.name] += lanes.count
            if ins.opcode in BRANCHES or is_barrier(ins):
                self.counter[... if index is None else index] = counter
                self._flow(ins, lanes)
                return
            if lanes.count:
                result = self.program.rules[counter - 1](lanes, ins)
                if result is not None:
                    lanes.write(ins.operands[0], result)
            if counter in self.program.joins:
                self.counter[... if index is None else index] = counter
                return
        self.state[... if index is None else index] = EXITED
        self._open_barriers()

    def _gather(self, ins: p.Instruction, counter: int, index: Array) -> Array:
        """The lanes here whose mask is complete, those that waited among them; the others wait.

        A lane waits for those anywhere else that have not exited: one that is ahead may come back in a loop.
        """
        here = self.waiting & (self.counter == counter)
        here[index] = True
        elsewhere = (self.state != EXITED) & ~here
        index = np.nonzero(here)[0]
        lane = np.uint32(1) << (self.threads.thread % WARP_SIZE).astype(np.uint32)
        missing = np.zeros(self.threads.warp_row.max() + 1, np.uint32)
        np.bitwise_or.at(missing, self.threads.warp_row[elsewhere], lane[elsewhere])
        mask = mask_operand(ins)
        members = np.uint32(ALL_LANES) if mask is None else Lanes(self.threads, ins, index).read_full(mask, "u32")
        waits = missing[self.threads.warp_row[index]] & members != 0
        self.waiting[index], self.counter[index] = waits, counter
        return index[~waits]

    def _lanes(self, ins: p.Instruction, index: Array | None) -> Lanes:
        lanes = Lanes(self.threads, ins, index)
        if ins.guard is None:
            return lanes
        taken = lanes.read(ins.guard, "pred")
        return lanes if taken.all() else Lanes(self.threads, ins, lanes.positions[taken])

    def _flow(self, ins: p.Instruction, lanes: Lanes) -> None:
        if ins.opcode == "bra":
            target = ins.operands[-1]
            if not isinstance(target, p.Symbol) or target.name not in self.program.kernel.labels:
                raise UnknownInstructionError(f"kernel {self.program.kernel.name}: target of `{ins.text}`")
            self.counter[lanes.positions] = self.program.kernel.labels[target.name]
            return
        if ins.opcode in ("ret", "exit"):
            self.state[lanes.positions] = EXITED
        elif lanes.count:
            self._arrive(ins, lanes)
        self._open_barriers()

    def _arrive(self, ins: p.Instruction, lanes: Lanes) -> None:
        if "arrive" in ins.modifiers:
            raise UnknownInstructionError(f"kernel {self.program.kernel.name}: .arrive in `{ins.text}`")
        self.state[lanes.positions] = lanes.read_full(ins.operands[0], "u32") if ins.operands else 0
        whole = self.threads.geometry.block_threads
        count = lanes.read_full(ins.operands[1], "u32") if len(ins.operands) > 1 else np.full(lanes.count, whole)
        self.expected[lanes.positions] = count

    def _open_barriers(self) -> None:
        """Let go where all threads of a program have arrived; threads that have exited count as arrived."""
        size = self.threads.geometry.block_threads
        state, expected = self.state.reshape(-1, size), self.expected.reshape(-1, size)
        exited = (state == EXITED).sum(1)
        for number in np.unique(state[state >= 0]):
            here = state == number
            wanted = np.where(here, expected, 0).max(1)
            arrived = here.sum(1) + np.where(wanted == size, exited, 0)
            full = here.any(1) & (arrived >= wanted)
            state[full[:, None] & here] = RUNNING
            self.threads.program_epoch[full] += 1

    def _deadlock(self) -> None:
        waiting = np.nonzero(self.state >= 0)[0]
        places = sorted({self.code[int(c) - 1].text for c in np.unique(self.counter[waiting])})
        program = int(self.threads.program[waiting[0]])
        raise BarrierDeadlockError(
            f"kernel {self.program.kernel.name}: program {program}: {len(waiting)} threads wait forever at "
            f"`{'`, `'.join(places)}`"
        )


def _global_bits(name: str, opcodes: tuple[str, ...]) -> int:
    """Bits of global memory that an instruction of one of the opcodes accesses; 0 for others."""
    opcode, *tokens = name.split(".")
    if opcode not in opcodes or any(token.partition("::")[0] in OTHER_SPACES for token in tokens):
        return 0
    return bits(tokens[-1]) * next((int(token[1:]) for token in tokens if token in ("v2", "v4", "v8")), 1)


def _three(sizes: Sequence[int]) -> tuple[int, int, int]:
    x, y, z = (*(int(s) for s in sizes), 1, 1, 1)[:3]
    return x, y, z
