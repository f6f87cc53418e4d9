"""A list of tensors for one launch: tables of chunks with their addresses, and the rows in which they are counted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from feather_kernels.backends.layouts import dense
from feather_kernels.backends.resident import resident

COLUMNS = 5  # of a table: address, elements, whether 16 divides the address, row, index of the tensor


Entry = tuple[int, int, int, int]  # of a tensor: address, elements, row, index


class Table(NamedTuple):
    """The chunks of tensors of one storage dtype, int64 (C, COLUMNS) on the device; the tensors, to keep them alive."""

    chunks: Tensor
    dtype: torch.dtype
    kept: list[Tensor]


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
    tables = []
    for dtype, entries in listed.items():
        make = partial(_chunks, entries, dtype.itemsize, chunk)
        chunks = resident(("chunks", chunk, dtype, *entries), weights[0].device, make)
        tables.append(Table(chunks, dtype, kept[dtype]))
    return tables


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


def _chunks(entries: Sequence[Entry], element_size: int, chunk: int) -> Tensor:
    return torch.cat([_chunks_of(entry, element_size, chunk) for entry in entries])


def _chunks_of(entry: Entry, element_size: int, chunk: int) -> Tensor:
    address, numel, row, index = entry
    starts = torch.arange(0, numel, chunk, device="cpu")
    constant = [torch.full_like(starts, value) for value in (address % 16 == 0, row, index)]
    return torch.stack([address + starts * element_size, (numel - starts).clamp_max(chunk), *constant], 1)
