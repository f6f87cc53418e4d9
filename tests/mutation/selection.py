"""Checks of selection (see cases.py); a mutant of its kernels should fail one."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import struct
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from tests.mutation.cases import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    INF,
    NAN,
    ROOM,
    Case,
    most_bytes,
    whole_blocks_are_wide,
)
from tests.mutation.lists import seeded
from tests.mutation.selection_inputs import SELECTIONS, selection
from tests.simulated_gpu.executed_cuda import plain_name
from tests.support import oracle, samples
from tools.ptx_executor.execution import LaunchReport, Program

ops = torch.ops.feather_kernels


WIDEST = 1 << 17  # keys of a bracket
ROW = 512  # keys whose counts the brackets of both backends sum
WARP = 64  # of them, those of a CUDA warp
ONE = 0x3F800000  # the key of 1.0
SCALARS = 7  # of a thread: its chunk's row in the table, the hint, a scale


def later_passes_exit_at_once(launches: list[LaunchReport]) -> None:
    """As where the bracket holds what is wanted: they read next to nothing."""
    for report in launches:
        if report.kernel in ("histogram_kernel", "smallest_above_kernel"):
            most_bytes([report], 0)


def cold(launches: list[LaunchReport], name: str) -> None:
    made, calls = selection(name)
    for ranks, values in calls:
        found = made.select(ranks)
        assert oracle.same_bits(found, values), f"ranks {ranks}"
        bits = found[found.isnan()].view(oracle.INTEGERS[found.element_size()])
        assert (bits == oracle.QUIET_NAN[found.dtype]).all(), "another NaN than the one of the contract"


def steady(launches: list[LaunchReport], name: str, elements: int | None = None) -> None:
    """With the result as hint, where keys are close: every byte once, and the passes behind exit at once.

    elements: of a net for which the brackets are made.
    """
    made, calls = selection(name)
    for ranks, values in calls[1:5] if elements else calls[2:4]:
        launches.clear()
        with as_in_a_net_of(elements) if elements else nullcontext():
            assert oracle.same_bits(made.select(ranks, values), values), f"ranks {ranks}"
        later_passes_exit_at_once(launches)


def select_each(listed: list[Tensor], ranks: Sequence[int], hint: Tensor | None, scale: float | None = None) -> Tensor:
    """The call with each array a group of its own, their scores all scaled alike."""
    scales = None if scale is None else torch.full((len(listed),), scale, dtype=oracle.compute_dtype(listed[0].dtype))
    return ops.magnitude_select(listed, list(range(len(listed))), torch.tensor(ranks), scales=scales, hint=hint)


def ends_of_ties(launches: list[LaunchReport], name: str) -> None:
    """With the widest brackets, for ranks that a count too many or too few takes to another value."""
    launches.clear()
    made, _ = selection(name)
    scores = [torch.cat(made.scores(group)[0]).sort().values for group in range(made.group_count)]
    ends = [(own.diff() > 0).nonzero().flatten() for own in scores]
    for fraction in (0.0, 0.2, 0.4, 0.6, 0.8, 0.99):
        ranks = [int(own[int(fraction * len(own))]) for own in ends]
        values = torch.stack([own[[rank, rank + 1]] for own, rank in zip(scores, ranks, strict=True)])
        with as_in_a_net_of(1 << 40):
            assert oracle.same_bits(made.select(ranks, values), values), f"ranks {ranks}"


HINTS = (NAN, 0.0, INF)


def misled(launches: list[LaunchReport], name: str) -> None:
    """A hint that is wrong costs time, never correctness."""
    made, calls = selection(name)
    ranks, values = calls[3]
    for hint in (*HINTS, float(values[0, 0]) * 1.0001):
        given = torch.full_like(values, hint)
        assert oracle.same_bits(made.select(ranks, given), values), f"hint {hint}"


def edges(launches: list[LaunchReport], around: float, bins: int, as_scales: bool = False) -> None:
    """Keys at chosen places of the bracket and next to it, which holds what is wanted or just does not.

    as_scales: as the scales of weights that are 1.
    """
    middle, last = bins // 2, bins - 1
    first = min(max(int(torch.tensor(around).view(torch.int32)) - middle, 0), 0x7F800001 - bins)
    at = [0, 1, ROW - 1, ROW, ROW + 1, middle - 1, middle, middle, middle, middle + 3, last - ROW, last - 1, last, last]
    of_warps = [ROW + WARP * i + step for i in range(1, ROW // WARP) for step in (-1, 0)] if bins > 3 * ROW else []
    keys = first + torch.tensor(sorted([-1, *at, *of_warps, bins]), dtype=torch.int32)
    inside = keys[(keys >= 0) & (keys <= 0x7F800000)].view(torch.float32)
    scores = torch.cat([inside.flip(0), torch.zeros(9), torch.full((7,), INF)])
    hint, ordered = torch.tensor([[around, NAN]] * 2), scores.sort().values
    ends = (ordered[1:] > ordered[:-1]).nonzero().flatten()
    listed, scales = [-scores, scores], None
    if as_scales:
        listed, scales = [torch.ones(1) for _ in (*scores, *scores)], torch.cat([scores, scores])
    groups = [2 * i // len(listed) for i in range(len(listed))]
    ranks = sorted({0, *ends.tolist(), *(ends + 1).tolist()})
    for pair in zip(ranks, reversed(ranks), strict=True):
        launches.clear()
        with as_in_a_net_of(2 * 16 * bins):
            values = ops.magnitude_select(listed, groups, torch.tensor(pair), scales=scales, hint=hint)
        expected = torch.stack([oracle.order_statistics([scores], rank) for rank in pair])
        assert oracle.same_bits(values, expected), f"ranks {pair}"
        if as_scales:  # a table of so many arrays is longer than they are
            continue
        passes = [report.bytes_read for report in launches if report.kernel == "histogram_kernel"]
        found, keys = max(passes) <= ROOM, values.view(torch.int32)
        assert found == bool(((keys >= first) & (keys < first + bins)).all()), f"ranks {pair}: found={found}"


def full(launches: list[LaunchReport], bins: int, group_count: int, scale: float | None = None) -> None:
    """Keys at most places of the bracket, some twice, so that no partial sum of counts is zero; a rank a group."""
    keys = ONE - bins // 2 + torch.arange(bins, dtype=torch.int32)
    times = torch.randint(0, 4, (bins,), generator=seeded(11)) * 2 // 3
    weight = keys.repeat_interleave(times).view(torch.float32)
    ranks = torch.linspace(0, weight.numel() - 1, group_count).long().tolist()
    launches.clear()
    with as_in_a_net_of(group_count * 16 * bins):
        found = select_each([weight / (scale or 1.0)] * group_count, ranks, torch.ones(group_count, 2), scale)
    assert oracle.same_bits(found, torch.stack([oracle.order_statistics([weight], rank) for rank in ranks]))
    later_passes_exit_at_once(launches)
    whole_blocks(launches, [weight.repeat(3)[: 1 << 11]] * group_count, group_count * 16 * bins, scale)


def whole_blocks(launches: list[LaunchReport], listed: list[Tensor], elements: int, scale: float | None) -> None:
    """Arrays of nothing but whole blocks are read 16 bytes at a time; their brackets, around 1, are those of a net."""
    launches.clear()
    with as_in_a_net_of(elements):
        found = select_each(listed, [0] * len(listed), torch.ones(len(listed), 2), scale)
    assert oracle.same_bits(found, torch.stack([oracle.order_statistics([oracle.scores(w, scale)], 0) for w in listed]))
    whole_blocks_are_wide(launches, "bracket_kernel", SCALARS)


# In a block of 1024 elements and 128 threads that read 8, 4 or 2 neighbours at once: each of the 8 elements of a
# thread, on several lanes and warps.
PLACES = (*range(248, 256), 510, 511, *range(764, 768), 1022, 1023)


def neighbours(
    launches: list[LaunchReport], dtype: torch.dtype, steady: bool, far: bool = False, scale: float | None = None
) -> None:
    """In each group one weight alone lies above the rank, at every place of a thread, in a tail and in a head.

    With the right hint and the widest brackets, or without one. Nearly all weights tie with the rank. far: the one has
    another first digit. scale: of the scores.
    """
    integer = oracle.INTEGERS[dtype.itemsize]
    four = torch.full((), 4.0, dtype=dtype).view(integer)  # whose exponent has its highest bit
    half = WIDEST // 2 >> {FLOAT32: 0, FLOAT16: 13, BFLOAT16: 16}.get(dtype, 0)
    steps = (0, half, 2 * half) if steady else (0, four.item() // 16 if far else 1, four.item() // 8)
    low, middle, high = ((four + step).view(dtype) for step in steps)
    second = 256 * 16 // dtype.itemsize  # elements of the CUDA kernels' first round, which are unrolled in twos
    at_ends = [(-1, start + rest) for start in ((640,) if steady else (128, 384, 640, 896)) for rest in range(1, 9)]
    aligned = [(place, second + 9 if place < second else 1100) for place in PLACES]
    aligned += [(place + i * second, 3 * second + 9) for place in range(24, 32) for i in (1, 2)] + [(-1, second + 9)]
    listed = []
    for is_aligned, places in ((True, aligned), (False, [(place, 1100) for place in (0, *PLACES)])):
        for place, length in places + at_ends:
            w = torch.full((length,), low.item(), dtype=dtype)
            w[::5], w[place], w[1] = high, middle, 0.25
            listed.append(w if is_aligned else samples.LAYOUTS["misaligned"](w))
    groups_at_once = 3 if steady else len(listed)  # as many as have the widest brackets
    for first in range(0, len(listed), groups_at_once):
        part = listed[first : first + groups_at_once]
        ranks = [int((w <= low).sum()) - 1 for w in part]
        values = torch.stack(
            [oracle.order_statistics([oracle.scores(w, scale)], r) for w, r in zip(part, ranks, strict=True)]
        )
        launches.clear()
        with as_in_a_net_of(1 << 40):
            # around the upper value: the lower one is the bracket's first key, the next behind it
            hint = values[:, 1:].expand(-1, 2).contiguous() if steady else None
            found = select_each(part, ranks, hint, scale)
        assert oracle.same_bits(found, values)
        if steady:
            later_passes_exit_at_once(launches)
        if hint is not None and first == 0:
            between = (hint.view(torch.int32) - 1000).view(FLOAT32)  # keys that a weight of 16 bits does not have
            with as_in_a_net_of(1 << 40):
                assert oracle.same_bits(select_each(part, ranks, between, scale), values)
            later_passes_exit_at_once(launches)
    if steady:
        whole_blocks(launches, [torch.ones(1 << 11, dtype=dtype)] * groups_at_once, 1 << 40, scale)


def infinities(launches: list[LaunchReport], dtype: torch.dtype) -> None:
    """The largest number, infinities and NaN, each in turn."""
    weight = torch.tensor([-INF, torch.finfo(dtype).max, NAN, INF, 1.0, -NAN], dtype=dtype)
    for rank in range(weight.numel()):
        found = ops.magnitude_select([weight], [0], torch.tensor([rank]))
        assert oracle.same_bits(found[0], oracle.order_statistics([oracle.scores(weight)], rank)), f"rank {rank}"


def later_rows(launches: list[LaunchReport], bins: int, of_warp: Sequence[int] = (0, 3, 4, 6, 7, 32, 62, 63)) -> None:
    """The neighbour is the one key of a later row, which each warp sums once."""
    first = ONE - bins // 2
    places = [(5, ROW + WARP * warp + odd) for warp in range(ROW // WARP) for odd in of_warp]
    keys = first + torch.tensor(places, dtype=torch.int32)
    values = keys.view(torch.float32)
    launches.clear()
    with as_in_a_net_of(16 * bins * len(values)):
        found = select_each(list(values), [0] * len(values), torch.ones(len(values), 2))
    assert oracle.same_bits(found, values)
    later_passes_exit_at_once(launches)


@contextmanager
def as_in_a_net_of(elements: int) -> Iterator[None]:
    """The brackets are as wide as for a selection from that many: one key for 16."""
    backends = ["cuda", *(["triton.select"] if importlib.util.find_spec("triton") else [])]
    with ExitStack() as stack:
        for backend in backends:
            name = f"feather_kernels.backends.{backend}.element_count"
            stack.enter_context(mock.patch(name, return_value=elements))
        yield


def counts_beyond_32_bits(launches: list[LaunchReport], dtype: torch.dtype) -> None:
    """As if every element stood there 2^33 times: counts are multiplied on their way from each pass to its scan.

    Their address is an argument of its own in Triton, which drops caps where it is None, and a member of a struct in
    CUDA; a row of them is as long as the widest pass needs.
    """
    times, launch = 1 << 33, Program.launch

    def multiply_and_launch(program: Program, grid: Any, block: Any, arguments: bytes, *rest: Any) -> LaunchReport:
        if plain_name(program.kernel.name) == "scan_kernel":
            is_triton = program.kernel.name == "scan_kernel"
            (address,) = struct.unpack_from("<q", arguments, 8 * (3 if is_triton else 4))
            bins = (ctypes.c_int64 * (1 << (8 if is_triton else 11))).from_address(address)
            np.ctypeslib.as_array(bins)[:] *= times
        return launch(program, grid, block, arguments, *rest)

    weight = torch.randn(1300, generator=seeded(6)).to(dtype)
    scores = [oracle.scores(weight)]
    with mock.patch.object(Program, "launch", multiply_and_launch):
        for rank in (0, 5, 700, 1297, 1299):
            for copy in (0, times - 1):
                values = ops.magnitude_select([weight], [0], torch.tensor([rank * times + copy]))
                expected = oracle.order_statistics(scores, rank)
                expected = expected if copy else expected[[0, 0]]
                assert oracle.same_bits(values[0], expected), f"rank {rank}, copy {copy}"


def sums_beyond_32_bits(launches: list[LaunchReport]) -> None:
    """Counts of a bracket with bits in both halves: multiplied for the sums of its rows, divided after."""
    times, launch = (1 << 33) + 1, Program.launch
    sums_seen: list[int] = []

    def multiply_and_launch(program: Program, grid: Any, block: Any, arguments: bytes, *rest: Any) -> LaunchReport:
        if plain_name(program.kernel.name) not in ("sum_kernel", "bracket_sum_kernel"):
            return launch(program, grid, block, arguments, *rest)
        rows = grid[0]
        counts, sums = (
            np.ctypeslib.as_array((ctypes.c_int64 * size).from_address(address))
            for address, size in zip(struct.unpack_from("<2q", arguments), (rows * ROW, rows), strict=True)
        )
        counts *= times
        report = launch(program, grid, block, arguments, *rest)
        assert np.array_equal(sums, counts.reshape(rows, ROW).sum(1))
        sums_seen.extend(sums[sums > 0])
        counts //= times
        sums //= times
        return report

    keys = ONE + torch.randint(1024, (1300,), generator=seeded(8), dtype=torch.int32)
    weight, rank = keys.view(torch.float32), 700
    expected = oracle.order_statistics([oracle.scores(weight)], rank)
    with mock.patch.object(Program, "launch", multiply_and_launch):
        values = ops.magnitude_select([weight], [0], torch.tensor([rank]), hint=expected[None])
    assert oracle.same_bits(values[0], expected)
    assert len(sums_seen) > 1


def caps_decide(launches: list[LaunchReport], dtype: torch.dtype) -> None:
    """A neighbour that a cap takes away or just leaves, for ranks whose key ends at each place of a thread and warp.

    The first array's neighbour is in the next bin of the last digit, or under another prefix.
    """
    integer = oracle.INTEGERS[dtype.itemsize]
    one = torch.ones((), dtype=dtype).view(integer).item()
    listed, caps, values = [], [], []
    for end in (1, 2, 3, 4, 230, 359, 488, 613, 742, 871, 1000):
        for beyond in (end + 1, end + 4096):
            keys = [[0, 0, end - 1, end, end, beyond, beyond + 9], [end - 1, end, beyond + 5]]
            pair = [(one + torch.tensor(own, dtype=integer)).view(dtype) for own in keys]
            for own_caps in itertools.product((5, 6), (2, 3)):
                listed, caps = [*listed, *pair], [*caps, *own_caps]
                values.append(oracle.order_statistics(pair, 6, list(own_caps)))
    groups = [i // 2 for i in range(len(listed))]
    found = ops.magnitude_select(listed, groups, torch.full((len(values),), 6), caps=torch.tensor(caps))
    assert oracle.same_bits(found, torch.stack(values))


SPREAD = ("float32", "bfloat16", "float16", "bfloat16, scaled", "float16, scaled")
CASES = [
    *(Case(f"cold: {name}", partial(cold, name=name)) for name in SELECTIONS),
    *(
        Case(f"steady: {name}", partial(steady, name=name))
        for name in ("dense", "ties", "bfloat16 ties", "dense, scaled")
    ),
    *(
        Case(f"steady: spread {name}, widest", partial(steady, name=f"spread {name}", elements=1 << 40))
        for name in SPREAD
    ),
    *(Case(f"ends of ties: spread {name}", partial(ends_of_ties, name=f"spread {name}")) for name in SPREAD),
    *(Case(f"later rows of {bins} keys", partial(later_rows, bins=bins)) for bins in (1 << 10, 1 << 11, 1 << 14)),
    Case("later rows, widest", partial(later_rows, bins=WIDEST, of_warp=(0,))),
    Case("full bracket of 1024 keys", partial(full, bins=1 << 10, group_count=40)),
    Case("full bracket of 1024 keys, scaled", partial(full, bins=1 << 10, group_count=40, scale=0.5)),
    Case("full bracket of 2048 keys", partial(full, bins=1 << 11, group_count=40)),
    Case("full bracket of 16384 keys", partial(full, bins=1 << 14, group_count=20)),
    Case("full bracket of 131072 keys", partial(full, bins=WIDEST, group_count=3)),
    *(
        Case(
            f"neighbours: {str(dtype)[6:]}, steady{', scaled' * bool(scale)}",
            partial(neighbours, dtype=dtype, steady=True, scale=scale),
        )
        for dtype in (FLOAT16, BFLOAT16, FLOAT32)
        for scale in (None, 0.5)
    ),
    *(
        Case(
            f"neighbours: {str(dtype)[6:]}, cold{', far' * far}{', scaled' * bool(scale)}",
            partial(neighbours, dtype=dtype, steady=False, far=far, scale=scale),
        )
        for dtype in samples.DTYPES
        for far, scale in ((False, None), (True, None), (True, 0.5))
    ),
    *(Case(f"infinities, {str(dtype)[6:]}", partial(infinities, dtype=dtype)) for dtype in (FLOAT32, FLOAT64)),
    *(Case(f"caps decide, {str(dtype)[6:]}", partial(caps_decide, dtype=dtype)) for dtype in (FLOAT32, FLOAT64)),
    *(
        Case(f"counts beyond 32 bits, {str(dtype)[6:]}", partial(counts_beyond_32_bits, dtype=dtype))
        for dtype in (FLOAT32, FLOAT64)
    ),
    Case("sums beyond 32 bits", sums_beyond_32_bits),
    Case("misled: float32", partial(misled, name="float32")),
    *(
        Case(f"edges of {bins} keys around {around}", partial(edges, around=around, bins=bins))
        for around, bins in ((1.0, 1 << 10), (0.0, 1 << 10), (INF, 1 << 10), (1.0, 1 << 14))
    ),
    Case("edges, as scales", partial(edges, around=1.0, bins=1 << 10, as_scales=True)),
]
