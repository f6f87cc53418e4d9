"""Global memory (the host's own, addresses one to one) and shared memory, with bounds, alignment and byte counts."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from tools.ptx_executor.errors import MisalignedError, OutOfBoundsError
from tools.ptx_executor.races import RaceShadow
from tools.ptx_executor.scalar_types import UNSIGNED, Array

if TYPE_CHECKING:
    from tools.ptx_executor.lanes import Lanes

FIRST_ADDRESS = 4096  # numpy takes a null data pointer as "allocate": start one page up
ADDRESS_BITS = 47
SHARED_ALIGNMENT = 128
POISON = 0xFF  # each byte of what was not written: shared memory and registers; NaN as floats


class GlobalMemory:
    """The host's memory, of which a kernel may touch ``extents``: (address, bytes) of every tensor that it was given.

    ``bytes_read`` and ``bytes_written`` count each byte once per executed access of a program, however many of its
    threads ask for it: a scalar that all threads load costs its size. An atomic counts in both.
    """

    name = "global"

    def __init__(self, extents: Sequence[tuple[int, int]], race_granule: int | None = None) -> None:
        merged: list[list[int]] = []
        for start, size in sorted(e for e in extents if e[1] > 0):
            if merged and start < merged[-1][1]:
                merged[-1][1] = max(merged[-1][1], start + size)
            else:
                merged.append([start, start + size])
        self.starts = np.array([m[0] for m in merged], np.int64)
        self.ends = np.array([m[1] for m in merged], np.int64)
        sizes = self.ends - self.starts // 32 * 32 + 32
        self.shadow_offsets = np.concatenate([[0], np.cumsum(sizes // 32 * 32)]).astype(np.int64)
        self.shadow = RaceShadow(int(self.shadow_offsets[-1]), race_granule) if race_granule else None
        self.bytes_read = 0
        self.bytes_written = 0

    def cells(self, dtype: type) -> Array:
        """All of memory as an array of ``dtype``."""
        return _host(dtype)

    def index(self, addresses: Array, lanes: Lanes, dtype: type) -> Array:
        """Positions of aligned ``addresses`` in :meth:`cells`."""
        return (addresses - FIRST_ADDRESS) // np.dtype(dtype).itemsize

    def check(self, addresses: Array, size: int, lanes: Lanes, *, write: bool) -> None:
        """Raise MisalignedError or OutOfBoundsError."""
        _check_alignment(addresses, size, lanes, self.name)
        which = np.searchsorted(self.starts, addresses, "right") - 1
        outside = (which < 0) | (addresses + size > (self.ends[which] if len(self.ends) else 0))
        if outside.any():
            i = int(np.argmax(outside))
            raise lanes.fault(OutOfBoundsError, f"{_verb(write)} {size} bytes at {self._place(int(addresses[i]))}", i)

    def _place(self, address: int) -> str:
        if not len(self.starts):
            return f"0x{address:x} (the kernel was given no memory)"
        distance = np.maximum(self.starts - address, address - self.ends + 1)
        near = int(np.argmin(distance))
        start, size = int(self.starts[near]), int(self.ends[near] - self.starts[near])
        return f"0x{address:x} (nearest tensor at 0x{start:x}: its byte {address - start} of {size})"

    def shadow_positions(self, addresses: Array, lanes: Lanes) -> Array:
        """Byte positions in the race shadow."""
        which = np.searchsorted(self.starts, addresses, "right") - 1
        return addresses - self.starts[which] // 32 * 32 + self.shadow_offsets[which]

    def count(self, addresses: Array, size: int, lanes: Lanes, *, read: bool, written: bool) -> None:
        """Add an executed access to the counters."""
        programs = lanes.programs
        step = np.diff(addresses)
        if not ((step >= size) | (programs[1:] != programs[:-1])).all():
            order = np.lexsort((addresses, programs))
            addresses, programs = addresses[order], programs[order]
            step = np.diff(addresses)
        distinct = 1 + int(((step != 0) | (programs[1:] != programs[:-1])).sum()) if len(addresses) else 0
        self.bytes_read += distinct * size * read
        self.bytes_written += distinct * size * written


class SharedMemory:
    """The shared memory of all programs of a launch chunk, one row each; ``size`` bytes are valid."""

    name = "shared"

    def __init__(self, size: int, programs: int, race_granule: int | None = None) -> None:
        self.size = size
        self.stride = -(-size // SHARED_ALIGNMENT) * SHARED_ALIGNMENT + SHARED_ALIGNMENT
        self.data = np.full(programs * self.stride, POISON, np.uint8)
        self.shadow = RaceShadow(len(self.data), race_granule) if race_granule else None

    def cells(self, dtype: type) -> Array:
        """Every program's row, one after the other, as an array of ``dtype``."""
        return self.data.view(dtype)

    def index(self, addresses: Array, lanes: Lanes, dtype: type) -> Array:
        """Positions of aligned ``addresses`` in :meth:`cells`."""
        return self.shadow_positions(addresses, lanes) // np.dtype(dtype).itemsize

    def check(self, addresses: Array, size: int, lanes: Lanes, *, write: bool) -> None:
        """Raise MisalignedError or OutOfBoundsError."""
        _check_alignment(addresses, size, lanes, self.name)
        outside = (addresses < 0) | (addresses + size > self.size)
        if outside.any():
            i = int(np.argmax(outside))
            place = f"shared address 0x{int(addresses[i]):x} of {self.size} bytes"
            raise lanes.fault(OutOfBoundsError, f"{_verb(write)} {size} bytes at {place}", i)

    def shadow_positions(self, addresses: Array, lanes: Lanes) -> Array:
        """Byte positions in the race shadow."""
        return lanes.rows * self.stride + addresses

    def count(self, addresses: Array, size: int, lanes: Lanes, *, read: bool, written: bool) -> None:
        """Shared accesses are not counted."""


Space = GlobalMemory | SharedMemory


def extent(tensor: torch.Tensor) -> tuple[int, int]:
    """(address, bytes) from the first to the last element of a tensor."""
    if tensor.device.type != "cpu":
        raise ValueError(f"a simulated GPU works on CPU tensors, got one on {tensor.device}")
    if tensor.numel() == 0:
        return tensor.data_ptr(), 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), (last + 1) * tensor.element_size()


def _check_alignment(addresses: Array, size: int, lanes: Lanes, space: str) -> None:
    misaligned = addresses % size != 0
    if misaligned.any():
        i = int(np.argmax(misaligned))
        raise lanes.fault(MisalignedError, f"{size}-byte {space} access at 0x{int(addresses[i]):x}", i)


def _verb(write: bool) -> str:
    return "writes" if write else "reads"


_VIEWS: dict[type, Array] = {}


def _host(dtype: type) -> Array:
    if dtype not in _VIEWS:
        size = (1 << ADDRESS_BITS) - FIRST_ADDRESS
        whole = np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(FIRST_ADDRESS))
        _VIEWS.update({kind: whole.view(kind) for kind in UNSIGNED.values()})
    return _VIEWS[dtype]
