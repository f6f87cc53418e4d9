"""A list of tensors for one launch: tables of chunks with their addresses, and the rows in which they are counted."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from itertools import accumulate, count
from typing import NamedTuple

import torch
from torch import Tensor

from feather_kernels.backends.device_constants import KEPT, resident
from feather_kernels.backends.layouts import dense

COLUMNS = 5  # of a table: address, elements, whether 16 divides the address, row, index of the tensor
MOVES = 64  # tables of one layout, each soon after the one before and none used twice: then the tensors move
SOON = 8  # lists of tensors: a training step has fewer

_log = logging.getLogger("feather_kernels")
_lists = count()
_moves: OrderedDict[Hashable, Moves] = OrderedDict()  # by what tables have in common but the addresses
_unused: OrderedDict[Hashable, Hashable] = OrderedDict()  # the layouts of tables that have been used once, when made


Entry = tuple[int, int, int, int]  # of a tensor: address, elements, row, index


class Table(NamedTuple):
    """The chunks of tensors of one storage dtype, int64 (C, COLUMNS) on the device; the tensors, to keep them alive."""

    chunks: Tensor
    dtype: torch.dtype
    kept: list[Tensor]


class Moves(NamedTuple):
    """Tables of one layout, none of which was used again: number of the last list, and how many."""

    latest: int
    times: int


class Rows(NamedTuple):
    """Histogram rows: one a group, or (capped) one a tensor, numbered so that those of a group follow each other."""

    of_tensor: tuple[int, ...]
    starts: Tensor  # int64 (G + 1), on the device: first row of each group
    groups: Tensor  # int64 (R,): group of each row
    tensors: Tensor  # int64 (R,): tensor of each row, of use where every row is one


def make_tables(weights: Sequence[Tensor], rows: Sequence[int], chunk: int) -> list[Table]:
    """The tables of a list of tensors with the row of each, in chunks of that many elements.

    Layouts that are not dense are copied once.
    """
    kept: dict[torch.dtype, list[Tensor]] = {}
    listed: dict[torch.dtype, list[Entry]] = {}
    for index, (w, row) in enumerate(zip(weights, rows, strict=True)):  # of every weight in every step: one pass
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
        Table(_on_device(entries, dtype, chunk, weights[0].device, number), dtype, kept[dtype])
        for dtype, entries in listed.items()
    ]


def make_rows(groups: tuple[int, ...], group_count: int, capped: bool, device: torch.device) -> Rows:
    """The rows of a list of tensors with these groups."""
    if not capped:
        numbers = resident(("numbers", group_count), device, lambda: torch.arange(group_count + 1, device="cpu"))
        rows = numbers[:-1]
        return Rows(groups, numbers, rows, rows)
    tensors = sorted(range(len(groups)), key=lambda index: groups[index])
    starts = [0, *accumulate(groups.count(group) for group in range(group_count))]
    groups_of_rows = [groups[index] for index in tensors]
    values = starts + groups_of_rows + tensors
    packed = resident(
        ("rows", groups, group_count), device, lambda: torch.tensor(values, dtype=torch.int64, device="cpu")
    )
    row_of_tensor = dict(zip(tensors, range(len(tensors)), strict=True))
    of_tensor = tuple(row_of_tensor[index] for index in range(len(groups)))
    return Rows(of_tensor, *packed.split([len(starts), len(tensors), len(tensors)]))


def element_count(weights: Sequence[Tensor]) -> int:
    """Elements of all tensors together, by which brackets get their width."""
    return sum(w.numel() for w in weights)


def group_elements(weights: Sequence[Tensor], groups: Sequence[int], rank: Tensor) -> Tensor:
    """int64 (G,): elements of each group, on the device of rank (G,)."""
    elements = [0] * rank.numel()
    for w, group in zip(weights, groups, strict=True):
        elements[group] += w.numel()
    key = ("elements", *elements)
    return resident(key, rank.device, lambda: torch.tensor(elements, dtype=torch.int64, device="cpu"))


def _on_device(entries: list[Entry], dtype: torch.dtype, chunk: int, device: torch.device, number: int) -> Tensor:
    """The chunks of the list with that number, (C, COLUMNS)."""
    key = ("chunks", chunk, dtype, *entries)

    def make() -> Tensor:
        layout = (chunk, dtype, device, *(entry[1:] for entry in entries))
        _note_move(layout, device, number)
        _unused[key] = layout
        return _chunks(entries, dtype.itemsize, chunk)

    if _unused and (layout := _unused.pop(key, None)) is not None:
        _moves.pop(layout, None)  # different tensors of one layout, which stay where they are
    return resident(key, device, make)


def _chunks(entries: list[Entry], element_size: int, chunk: int) -> Tensor:
    """int64 (C, COLUMNS); the number of operations does not depend on that of the tensors."""
    listed = torch.tensor(entries, dtype=torch.int64, device="cpu")
    chunk_counts = (listed[:, 1] + (chunk - 1)) // chunk
    owner = torch.repeat_interleave(chunk_counts)
    places = torch.arange(len(owner), device="cpu") - (chunk_counts.cumsum(0) - chunk_counts)[owner]
    address, numel, row, index = listed[owner].unbind(1)
    starts = places * chunk
    aligned = (address % 16 == 0).to(torch.int64)
    return torch.stack([address + starts * element_size, (numel - starts).clamp_max(chunk), aligned, row, index], 1)


def _note_move(layout: Hashable, device: torch.device, number: int) -> None:
    """Count tables of one layout, and log once where the tensors move at every step."""
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
