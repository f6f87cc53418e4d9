"""Registers of all threads, and the lanes (the threads that execute one instruction) through which they are used."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from tools.ptx_executor import parsing as p
from tools.ptx_executor.errors import DataRaceError, PtxError, UnknownInstructionError
from tools.ptx_executor.memory import POISON, GlobalMemory, SharedMemory, Space
from tools.ptx_executor.races import NOBODY, WARP_EPOCH_BITS, describe
from tools.ptx_executor.scalar_types import FLOAT, SIGNED, UNSIGNED, Array, as_type, bits, split

WARP_SIZE = 32
MAX_WARPS = 32  # of a program; the race shadow packs the warp in 6 bits


@dataclass(frozen=True)
class Geometry:
    """The grid and the block of a launch and the programs of it that run together."""

    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    programs: Array  # linear numbers

    @property
    def block_threads(self) -> int:
        """Threads of one program."""
        return self.block[0] * self.block[1] * self.block[2]


class Threads:
    """The state of the threads of one launch chunk: registers, special registers, memories, barrier epochs."""

    def __init__(
        self,
        kernel: p.Kernel,
        geometry: Geometry,
        arguments: bytes,
        global_memory: GlobalMemory,
        shared_memory: SharedMemory,
        symbols: dict[str, int],
        rng: np.random.Generator,
        noise: bool,
    ) -> None:
        size, chunk = geometry.block_threads, len(geometry.programs)
        self.kernel, self.geometry, self.arguments = kernel, geometry, np.frombuffer(arguments, np.uint8)
        self.global_memory, self.shared_memory, self.symbols = global_memory, shared_memory, symbols
        self.rng, self.noise = rng, noise
        self.count = size * chunk
        self.thread = np.tile(np.arange(size), chunk)
        self.row = np.repeat(np.arange(chunk), size)
        self.program = np.repeat(geometry.programs, size)
        self.warp_row = self.row * MAX_WARPS + self.thread // WARP_SIZE
        self.race_id = self.program << 12 | (self.thread // WARP_SIZE) << 6 | self.thread % WARP_SIZE
        self.program_epoch = np.zeros(chunk, np.int64)
        self.warp_epoch = np.zeros(chunk * MAX_WARPS, np.int64)
        self.registers = _Registers(kernel.registers, self.count)
        self._specials: dict[str, Array] = {}
        self.clock = 0

    def special(self, name: str) -> Array:
        """A special register of every thread."""
        if name.startswith(("%clock", "%globaltimer")):
            self.clock += 1
            return np.full(self.count, self.clock, np.uint64)
        if name not in self._specials:
            self._specials[name] = np.broadcast_to(self._special(name), (self.count,)).astype(np.uint32)
        return self._specials[name]

    def _special(self, name: str) -> Array:
        base, _, axis = name[1:].partition(".")
        d = "xyz".find(axis) if axis else 0
        lane = self.thread % WARP_SIZE
        if base in ("tid", "ntid"):
            size = self.geometry.block
            index = self.thread // int(np.prod(size[:d]))
            return index % size[d] if base == "tid" else np.array([size[d]])
        if base in ("ctaid", "nctaid"):
            size = self.geometry.grid
            index = self.program // int(np.prod(size[:d], dtype=np.int64))
            return index % size[d] if base == "ctaid" else np.array([size[d]])
        if base.startswith("lanemask"):
            one = np.uint64(1) << lane.astype(np.uint64)
            low = one - np.uint64(1)
            masks = {"eq": one, "lt": low, "le": low | one, "gt": ~(low | one), "ge": ~low}
            return masks[base[-2:]] & np.uint64(0xFFFFFFFF)
        known = {"laneid": lane, "warpid": self.thread // WARP_SIZE, "cluster_ctarank": 0, "cluster_ctaid": 0}
        return np.asarray({**known, "cluster_nctaid": 1}[base])


class _Registers(dict[str, Array]):
    """Registers by name, each an array over the threads, made when it is first used: kernels declare far more.

    What a register holds before it is written is not defined: here all bits are set, and predicates differ by lane, so
    that a kernel that relies on either value is seen.
    """

    def __init__(self, widths: dict[str, int], count: int) -> None:
        self.widths, self.count = widths, count

    def __missing__(self, name: str) -> Array:
        width = self.widths[name]
        if width == 1:
            self[name] = np.arange(self.count) % 3 == 0
        else:
            self[name] = np.full(self.count * width // 8, POISON, np.uint8).view(UNSIGNED[width])
        return self[name]


class Lanes:
    """The threads that execute ``instruction`` now; ``index`` is None when they are all threads."""

    def __init__(self, threads: Threads, instruction: p.Instruction, index: Array | None) -> None:
        self.threads, self.instruction, self.index = threads, instruction, index
        self.count = threads.count if index is None else len(index)

    # -- who ------------------------------------------------------------------------------------------------------
    def of(self, values: Array) -> Array:
        """The entries of a per-thread array that belong to these lanes."""
        return values if self.index is None else values[self.index]

    @property
    def positions(self) -> Array:
        """Numbers of the lanes among the threads of the chunk."""
        return np.arange(self.threads.count) if self.index is None else self.index

    @property
    def programs(self) -> Array:
        """Linear program number of each lane."""
        return self.of(self.threads.program)

    @property
    def rows(self) -> Array:
        """Program number within the chunk of each lane."""
        return self.of(self.threads.row)

    def fault(self, error: type[PtxError], message: str, lane: int) -> PtxError:
        """``error`` with the kernel, the program, the thread and the instruction before ``message``."""
        program, thread = int(self.programs[lane]), int(self.of(self.threads.thread)[lane])
        where = f"kernel {self.threads.kernel.name}: program {program} thread {thread}"
        return error(f"{where}: `{self.instruction.text}` {message}")

    # -- registers ------------------------------------------------------------------------------------------------
    def read(self, operand: p.Operand, type_name: str) -> Array:
        """Values as numpy sees ``type_name``; one entry per lane, or a single entry for a constant."""
        return as_type(self.read_bits(operand, bits(type_name)), type_name)

    def read_full(self, operand: p.Operand, type_name: str) -> Array:
        """As :meth:`read`, always one entry per lane."""
        return np.broadcast_to(self.read(operand, type_name), (self.count,))

    def read_components(self, operand: p.Operand, type_name: str) -> list[Array]:
        """The float components of a scalar or packed operand (bf16 as float32)."""
        return split(self.read_bits(operand, bits(type_name)), type_name)

    def read_bits(self, operand: p.Operand, width: int) -> Array:
        """Raw unsigned bits (booleans for width 1)."""
        if isinstance(operand, p.Register):
            values = self.of(self.threads.registers[operand.name])
            return values if width == operand.width else values.astype(UNSIGNED[width])
        if isinstance(operand, p.Negated):
            return ~self.read_bits(operand.register, 1)
        if isinstance(operand, p.Special):
            return self.of(self.threads.special(operand.name)).astype(UNSIGNED[width])
        if isinstance(operand, p.Immediate):
            return _constant(operand, width)
        if isinstance(operand, p.Symbol) and operand.name in self.threads.symbols:
            return np.array([self.threads.symbols[operand.name]], np.uint64).astype(UNSIGNED[width])
        raise UnknownInstructionError(
            f"kernel {self.threads.kernel.name}: operand {operand} of `{self.instruction.text}`"
        )

    def write(self, operand: p.Operand, values: Array) -> None:
        """Store values; a narrower signed value is sign-extended, any other zero-extended."""
        if isinstance(operand, p.Sink):
            return
        if not isinstance(operand, p.Register):
            raise UnknownInstructionError(
                f"kernel {self.threads.kernel.name}: destination {operand} of `{self.instruction.text}`"
            )
        register = self.threads.registers[operand.name]
        register[... if self.index is None else self.index] = _raw(values, operand.width)

    def addresses(self, operand: p.Operand) -> Array:
        """Byte addresses of a memory operand, one per lane."""
        if not isinstance(operand, p.Address):
            raise UnknownInstructionError(f"kernel {self.threads.kernel.name}: address of `{self.instruction.text}`")
        width = operand.base.width if isinstance(operand.base, p.Register) else 64
        base = self.read_bits(operand.base, width).astype(np.int64) + operand.offset
        return np.broadcast_to(base, (self.count,))

    # -- memory ---------------------------------------------------------------------------------------------------
    def space(self) -> Space:
        """The memory that the instruction's state space names; generic addresses are global here."""
        name = self.instruction.choose("shared", "global", default="global")
        return self.threads.shared_memory if name == "shared" else self.threads.global_memory

    def report_race(
        self,
        space: Space,
        addresses: Array,
        size: int,
        *,
        write: bool,
        atomic: bool,
        unchanged: Array | None = None,
    ) -> None:
        """Enter an access into the race shadow; raises DataRaceError."""
        if space.shadow is None:
            return
        threads = self.threads
        ids = self.of(threads.race_id)
        epochs = threads.program_epoch[self.rows] << WARP_EPOCH_BITS | threads.warp_epoch[self.of(threads.warp_row)]
        for entries in space.shadow.granules(space.shadow_positions(addresses, self), size):
            if write:
                other = space.shadow.write(entries, ids, epochs, atomic=atomic, unchanged=unchanged)
            else:
                other = space.shadow.read(entries, ids, epochs, atomic=atomic)
            if (other != NOBODY).any():
                lane = int(np.argmax(other != NOBODY))
                place = f"{space.name} address 0x{int(addresses[lane]):x}"
                raise self.fault(DataRaceError, f"races with {describe(int(other[lane]))} at {place}", lane)


def _constant(operand: p.Immediate, width: int) -> Array:
    if width == 1:
        return np.array([bool(operand.value)])
    if operand.float_width and operand.float_width != width:
        exact: Array = np.array([operand.value], UNSIGNED[operand.float_width]).view(FLOAT[operand.float_width])
        return exact.astype(FLOAT[width]).view(UNSIGNED[width])
    return np.array([operand.value & ((1 << width) - 1)], UNSIGNED[width])


def _raw(values: Array, width: int) -> Array:
    if width == 1:
        return values.astype(bool)
    if values.dtype.kind == "f":
        values = values.view(UNSIGNED[values.dtype.itemsize * 8])
    if values.dtype.kind == "i":
        values = values.astype(SIGNED[width])
    return values.astype(UNSIGNED[width])
