"""A list of tensors for one launch: tables of chunks with their addresses, and the rows in which they are counted."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

COLUMNS = 5  # of a table: address, elements, whether 16 divides the address, row, index of the tensor
TABLES_KEPT = 16


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

    Layouts that are not dense are copied once. Chunks are cached by what stands in them, so that a training step
    uploads nothing after the first.
    """
    flat = [_dense(w) for w in weights]
    tables = []
    for dtype in dict.fromkeys(w.dtype for w in flat):
        members = [(index, w) for index, w in enumerate(flat) if w.dtype == dtype and w.numel()]
        key = (chunk, *((w.device, w.data_ptr(), w.numel(), dtype, rows[index], index) for index, w in members))
        chunks = _cached.pop(key, None)
        if members and chunks is None:
            entries = torch.cat([_chunks_of(w, rows[index], index, chunk) for index, w in members])
            chunks = upload(entries, weights[0].device)
        if chunks is not None:
            _cached[key] = chunks
            tables.append(Table(chunks, dtype, [w for _, w in members]))
    while len(_cached) > TABLES_KEPT:
        _cached.popitem(last=False)
    return tables


_cached: OrderedDict[tuple[object, ...], Tensor] = OrderedDict()


def _chunks_of(w: Tensor, row: int, index: int, chunk: int) -> Tensor:
    starts = torch.arange(0, w.numel(), chunk)
    addresses = w.data_ptr() + starts * w.element_size()
    constant = [torch.full_like(starts, value) for value in (w.data_ptr() % 16 == 0, row, index)]
    return torch.stack([addresses, (w.numel() - starts).clamp_max(chunk), *constant], 1)


def _dense(w: Tensor) -> Tensor:
    strides = w.stride()
    return w.detach().permute(sorted(range(w.dim()), key=lambda d: (-strides[d], d))).contiguous()


@lru_cache(maxsize=TABLES_KEPT)
def make_rows(groups: tuple[int, ...], group_count: int, capped: bool, device: torch.device) -> Rows:
    """The rows of a list of tensors with these groups."""
    if not capped:
        numbers = upload(torch.arange(group_count + 1), device)
        return Rows(groups, numbers, numbers[:-1], numbers[:-1])
    tensors = sorted(range(len(groups)), key=lambda index: groups[index])
    row_of_tensor = dict(zip(tensors, range(len(tensors)), strict=True))
    sizes = [groups.count(group) for group in range(group_count)]
    starts = torch.tensor([0, *accumulate(sizes)])
    groups_of_rows = torch.tensor([groups[index] for index in tensors])
    of_tensor = tuple(row_of_tensor[index] for index in range(len(groups)))
    return Rows(of_tensor, *(upload(part, device) for part in (starts, groups_of_rows, torch.tensor(tensors))))


@lru_cache(maxsize=TABLES_KEPT)
def group_elements(numels: tuple[int, ...], groups: tuple[int, ...], group_count: int, device: torch.device) -> Tensor:
    """int64 (G,): elements of each group."""
    sizes = torch.zeros(group_count, dtype=torch.int64)
    return upload(sizes.index_add_(0, torch.tensor(groups), torch.tensor(numels)), device)


def upload(table: Tensor, device: torch.device) -> Tensor:
    """A table from the host on the device, without waiting for it."""
    return table.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else table.to(device)
