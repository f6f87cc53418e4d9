"""Chunk tables let one launch process a list of tensors.

A table lists chunks of the tensors with their addresses, so that each program of a kernel handles one chunk. The rows
say in which histogram the chunks of a tensor are counted.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from itertools import accumulate, count
from typing import NamedTuple

import torch
from torch import Tensor

from feather_kernels.backends.device_constants import KEPT, device_constant
from feather_kernels.backends.layouts import dense

COLUMNS = 5  # of a table: address, elements, whether 16 divides the address, row, index of the tensor
MOVES = 64  # so many tables of one layout, each soon after the one before and none used twice, mean moving tensors
SOON = 8  # lists of tensors later; a training step has fewer

_log = logging.getLogger("feather_kernels")
_lists = count()
_moves: OrderedDict[Hashable, Moves] = OrderedDict()  # by layout: all that tables have in common but addresses
_unused: OrderedDict[Hashable, Hashable] = OrderedDict()  # layout by key, of tables that were used only when made

Entry = tuple[int, int, int, int]  # of a tensor: address, elements, row, index


class ChunkTable(NamedTuple):
    """The chunks of all tensors of one storage dtype.

    Attributes:
        chunks: int64 (C, COLUMNS), on the device.
        dtype: of the tensors.
        kept: the tensors, which must live as long as a launch may read them.
    """

    chunks: Tensor
    dtype: torch.dtype
    kept: list[Tensor]


class Moves(NamedTuple):
    """Tables of one layout, none of which was used again.

    Attributes:
        latest: number of the list of tensors that the last one was made for.
        times: how many tables.
    """

    latest: int
    times: int


class HistogramRows(NamedTuple):
    """The histogram rows: one per group, or with caps one per tensor, in which case the rows of a group are adjacent.

    Attributes:
        of_tensor: the row of each tensor.
        starts: int64 (G + 1), on the device: the first row of each group.
        groups: int64 (R,), on the device: the group of each row.
        tensors: int64 (R,), on the device: the tensor of each row, if every row is one.
    """

    of_tensor: tuple[int, ...]
    starts: Tensor
    groups: Tensor
    tensors: Tensor


def make_tables(weights: Sequence[Tensor], rows: Sequence[int], chunk: int) -> list[ChunkTable]:
    """Return one table for each storage dtype among the tensors.

    Args:
        weights: the tensors; layouts that are not dense are copied once.
        rows: the row of each.
        chunk: elements of a chunk.
    """
    kept: dict[torch.dtype, list[Tensor]] = {}
    listed: dict[torch.dtype, list[Entry]] = {}
    for index, (w, row) in enumerate(zip(weights, rows, strict=True)):  # runs for every weight in every step: one pass
        numel = w.numel()
        if numel:
            w = dense(w)
            dtype = w.dtype
            if dtype not in kept:
                kept[dtype], listed[dtype] = [], []
            kept[dtype].append(w)
            listed[dtype].append((w.data_ptr(), numel, row, index))
    number = next(_lists)
    return [
        ChunkTable(_on_device(entries, dtype, chunk, weights[0].device, number), dtype, kept[dtype])
        for dtype, entries in listed.items()
    ]


def make_rows(groups: tuple[int, ...], group_count: int, capped: bool, device: torch.device) -> HistogramRows:
    """Return the histogram rows of a list of tensors.

    Args:
        groups: the group of each tensor.
        group_count: G.
        capped: whether each tensor needs a row of its own.
        device: where the rows are kept.
    """
    if not capped:
        numbers = device_constant(("numbers", group_count), device, lambda: torch.arange(group_count + 1, device="cpu"))
        rows = numbers[:-1]
        return HistogramRows(groups, numbers, rows, rows)
    tensors = sorted(range(len(groups)), key=lambda index: groups[index])
    starts = [0, *accumulate(groups.count(group) for group in range(group_count))]
    groups_of_rows = [groups[index] for index in tensors]
    values = starts + groups_of_rows + tensors
    packed = device_constant(
        ("rows", groups, group_count), device, lambda: torch.tensor(values, dtype=torch.int64, device="cpu")
    )
    row_of_tensor = dict(zip(tensors, range(len(tensors)), strict=True))
    of_tensor = tuple(row_of_tensor[index] for index in range(len(groups)))
    return HistogramRows(of_tensor, *packed.split([len(starts), len(tensors), len(tensors)]))


def element_count(weights: Sequence[Tensor]) -> int:
    """Return the number of elements of all tensors together, which determines the width of brackets."""
    return sum(w.numel() for w in weights)


def group_elements(weights: Sequence[Tensor], groups: Sequence[int], rank: Tensor) -> Tensor:
    """Return the number of elements of each group, int64 (G,), on the device of ``rank`` (G,)."""
    elements = [0] * rank.numel()
    for w, group in zip(weights, groups, strict=True):
        elements[group] += w.numel()
    key = ("elements", *elements)
    return device_constant(key, rank.device, lambda: torch.tensor(elements, dtype=torch.int64, device="cpu"))


def _on_device(entries: list[Entry], dtype: torch.dtype, chunk: int, device: torch.device, number: int) -> Tensor:
    """Return the chunks (C, COLUMNS) of the list with that number, uploading them if they are new."""
    key = ("chunks", chunk, dtype, *entries)

    def make() -> Tensor:
        layout = (chunk, dtype, device, *(entry[1:] for entry in entries))
        _note_move(layout, device, number)
        _unused[key] = layout
        return _chunks(entries, dtype.itemsize, chunk)

    if _unused and (layout := _unused.pop(key, None)) is not None:
        _moves.pop(layout, None)  # the tensors have not moved: there are several of one layout
    return device_constant(key, device, make)


def _chunks(entries: list[Entry], element_size: int, chunk: int) -> Tensor:
    """Return the chunks, int64 (C, COLUMNS), by a number of operations that does not depend on that of the tensors."""
    listed = torch.tensor(entries, dtype=torch.int64, device="cpu")
    chunk_counts = (listed[:, 1] + (chunk - 1)) // chunk
    owner = torch.repeat_interleave(chunk_counts)
    places = torch.arange(len(owner), device="cpu") - (chunk_counts.cumsum(0) - chunk_counts)[owner]
    address, numel, row, index = listed[owner].unbind(1)
    starts = places * chunk
    aligned = (address % 16 == 0).to(torch.int64)
    return torch.stack([address + starts * element_size, (numel - starts).clamp_max(chunk), aligned, row, index], 1)


def _note_move(layout: Hashable, device: torch.device, number: int) -> None:
    """Count the tables of one layout, and log once if the tensors move at every step."""
    latest, times = _moves.pop(layout, Moves(number, 0))
    told = times >= MOVES
    times = times + 1 if told or number - latest <= SOON else 1
    if times == MOVES and not told:
        _log.info(
            "%s: the weights' memory has moved %d times in a row (sharded or swapped weights, or copies of layouts "
            "that are not dense): each time a table of their addresses is made and uploaded, and no CUDA graph of such "
            "a step can be captured",
            device, times,
        )  # fmt: skip
    _moves[layout] = Moves(number, times)
    for remembered in (_moves, _unused):
        while len(remembered) > KEPT:
            remembered.popitem(last=False)
