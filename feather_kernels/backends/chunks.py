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
    flat = [dense(w) for w in weights]
    tables = []
    for dtype in dict.fromkeys(w.dtype for w in flat if w.numel()):
        members = [(index, w) for index, w in enumerate(flat) if w.dtype == dtype and w.numel()]
        key = ("chunks", chunk, dtype, *((w.data_ptr(), w.numel(), rows[index], index) for index, w in members))
        chunks = resident(key, weights[0].device, partial(_chunks, members, rows, chunk))
        tables.append(Table(chunks, dtype, [w for _, w in members]))
    return tables


def make_rows(groups: tuple[int, ...], group_count: int, capped: bool, device: torch.device) -> Rows:
    """The rows of a list of tensors with these groups."""
    if not capped:
        numbers = resident(("numbers", group_count), device, lambda: torch.arange(group_count + 1))
        return Rows(groups, numbers, numbers[:-1], numbers[:-1])
    tensors = sorted(range(len(groups)), key=lambda index: groups[index])
    starts = [0, *accumulate(groups.count(group) for group in range(group_count))]
    groups_of_rows = [groups[index] for index in tensors]
    packed = resident(("rows", groups, group_count), device, lambda: torch.tensor(starts + groups_of_rows + tensors))
    row_of_tensor = dict(zip(tensors, range(len(tensors)), strict=True))
    of_tensor = tuple(row_of_tensor[index] for index in range(len(groups)))
    return Rows(of_tensor, *packed.split([len(starts), len(tensors), len(tensors)]))


def element_count(weights: Sequence[Tensor]) -> int:
    """Elements of all tensors together, by which brackets get their width."""
    return sum(w.numel() for w in weights)


def group_elements(weights: Sequence[Tensor], groups: Sequence[int], group_count: int, device: torch.device) -> Tensor:
    """int64 (G,): elements of each group."""
    elements = [0] * group_count
    for w, group in zip(weights, groups, strict=True):
        elements[group] += w.numel()
    return resident(("elements", *elements), device, lambda: torch.tensor(elements))


def _chunks(members: Sequence[tuple[int, Tensor]], rows: Sequence[int], chunk: int) -> Tensor:
    return torch.cat([_chunks_of(w, rows[index], index, chunk) for index, w in members])


def _chunks_of(w: Tensor, row: int, index: int, chunk: int) -> Tensor:
    starts = torch.arange(0, w.numel(), chunk)
    addresses = w.data_ptr() + starts * w.element_size()
    constant = [torch.full_like(starts, value) for value in (w.data_ptr() % 16 == 0, row, index)]
    return torch.stack([addresses, (w.numel() - starts).clamp_max(chunk), *constant], 1)
