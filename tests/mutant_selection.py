"""Checks of selection that a mutant should fail, see mutant_cases.py."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
import struct
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial
from typing import Any
from unittest import mock

import numpy as np
import oracle
import samples
import torch
from cuda_ptx import plain_name
from mutant_cases import BFLOAT16, FLOAT16, FLOAT32, FLOAT64, INF, NAN, ROOM, Case, most_bytes
from mutant_lists import seeded, weight_list
from ptx.execution import LaunchReport, Program
from torch import Tensor

ops = torch.ops.feather_kernels


WIDEST = 1 << 17  # keys of a bracket
ROW = 512  # keys whose counts the brackets of both backends sum
WARP = 64  # of them, those of a CUDA warp


def spread(dtype: torch.dtype, scales: Sequence[float] | None = None) -> Selection:
    """Keys all over the widest bracket around them, below and beyond it, at every place of a thread."""
    steps = {FLOAT32: 60_000, FLOAT16: 7, BFLOAT16: 0}[dtype]  # of the dtype, to one side, in half a bracket
    g = seeded(7)
    at = torch.randint(0, steps + 1, (9001,), generator=g).double()
    near = (1 + at * torch.finfo(dtype).eps).to(dtype)
    kind = torch.randint(0, 10, near.shape, generator=g)
    near = near.where(kind > 1, 0.25).where(kind < 9, 3.0)
    return Selection(
        [near, near[:4700], samples.LAYOUTS["misaligned"](near[:1031]), near[:3], -near[:516]], [0, 1, 0], scales
    )


class Selection:
    """Calls of magnitude_select for many ranks. groups, scales and caps repeat themselves over the list.

    empty_groups: behind those that have weights.
    """

    FRACTIONS = (-1.0, 0.0, 0.3, 0.77, 0.95, 1.0)  # of each group's last rank; and the rank behind it

    def __init__(
        self,
        listed: list[Tensor],
        groups: Sequence[int],
        scales: Sequence[float] | None = None,
        caps: Sequence[int] | None = None,
        empty_groups: int = 0,
    ) -> None:
        def repeated(values: Sequence[Any]) -> list[Any]:
            return [values[i % len(values)] for i in range(len(listed))]

        self.listed, self.groups = listed, repeated(groups)
        self.scales = None if scales is None else repeated(scales)
        self.caps = None if caps is None else repeated(caps)
        self.group_count = max(groups) + 1 + empty_groups

    def scores(self, group: int) -> tuple[list[Tensor], list[int] | None]:
        """Of a group: the scores of its weights, and how many each may lose."""
        members = [i for i, own in enumerate(self.groups) if own == group]
        parts = [oracle.scores(self.listed[i], self.scales and self.scales[i]) for i in members]
        if not members:
            return [oracle.scores(self.listed[0][:0])], [0]
        return parts, self.caps and [min(self.caps[i], self.listed[i].numel()) for i in members]

    def expected(self) -> list[tuple[list[int], Tensor]]:
        """The ranks of each call and what sorting finds there."""
        groups = [self.scores(group) for group in range(self.group_count)]
        totals = [sum(caps) if caps else sum(map(len, parts)) for parts, caps in groups]
        calls = [[int((total - 1) * fraction) for total in totals] for fraction in self.FRACTIONS]
        return [(ranks, self._sorted(groups, ranks)) for ranks in [*calls, totals]]

    @staticmethod
    def _sorted(groups: list[tuple[list[Tensor], list[int] | None]], ranks: list[int]) -> Tensor:
        found = [oracle.order_statistics(parts, rank, caps) for (parts, caps), rank in zip(groups, ranks, strict=True)]
        return torch.stack(found)

    def select(self, ranks: Sequence[int], hint: Tensor | None = None) -> Tensor:
        """The call."""
        compute = samples.compute_dtype(self.listed[0].dtype)
        return ops.magnitude_select(
            self.listed,
            self.groups,
            torch.tensor(ranks),
            scales=None if self.scales is None else torch.tensor(self.scales, dtype=compute),
            caps=None if self.caps is None else torch.tensor(self.caps),
            hint=hint,
        )


@cache
def selection(name: str) -> tuple[Selection, list[tuple[list[int], Tensor]]]:
    """A selection by its name, and its calls with their results."""
    made = SELECTIONS[name]()
    return made, made.expected()


def cold(launches: list[LaunchReport], name: str) -> None:
    made, calls = selection(name)
    for ranks, values in calls:
        found = made.select(ranks)
        assert oracle.same_bits(found, values), f"ranks {ranks}"
        bits = found[found.isnan()].view(torch.int32 if found.dtype == FLOAT32 else torch.int64)
        assert (bits >> {FLOAT32: 22, FLOAT64: 51}[found.dtype] & 1).all(), "a NaN that is no quiet one"


def steady(launches: list[LaunchReport], name: str, elements: int | None = None) -> None:
    """With the result as hint, where keys are close: every byte once, and the passes behind exit at once.

    elements: of a net for which the brackets are made.
    """
    made, calls = selection(name)
    for ranks, values in calls[1:5] if elements else calls[2:4]:
        launches.clear()
        with as_in_a_net_of(elements) if elements else nullcontext():
            assert oracle.same_bits(made.select(ranks, values), values), f"ranks {ranks}"
        for report in launches:
            if report.kernel in ("histogram_kernel", "smallest_above_kernel"):
                most_bytes([report], 0)


HINTS = (NAN, 0.0, INF)


def misled(launches: list[LaunchReport], name: str) -> None:
    """A hint that is wrong costs time, never correctness."""
    made, calls = selection(name)
    ranks, values = calls[3]
    for hint in (*HINTS, float(values[0, 0]) * 1.0001):
        given = torch.full_like(values, hint)
        assert oracle.same_bits(made.select(ranks, given), values), f"hint {hint}"


def edges(launches: list[LaunchReport], around: float, bins: int) -> None:
    """Keys at chosen places of the bracket, which holds what is wanted or just does not."""
    middle, last = bins // 2, bins - 1
    first = min(max(int(torch.tensor(around).view(torch.int32)) - middle, 0), 0x7F800001 - bins)
    at = [0, 1, ROW - 1, ROW, ROW + 1, middle - 1, middle, middle, middle, middle + 3, last - ROW, last - 1, last, last]
    of_warps = [ROW + WARP * i + step for i in range(1, ROW // WARP) for step in (-1, 0)] if bins > 3 * ROW else []
    inside = (first + torch.tensor(sorted([*at, *of_warps]), dtype=torch.int32)).view(torch.float32)
    weight = torch.cat([inside.flip(0), torch.zeros(9), torch.full((7,), -INF)])
    hint, scores = torch.tensor([[around, NAN]]), oracle.scores(weight)
    for rank in (8, 9, 10, *range(13, 15 + len(of_warps)), *(len(of_warps) + rank for rank in (17, 18, 21, 22))):
        launches.clear()
        with as_in_a_net_of(16 * bins):
            values = ops.magnitude_select([weight], [0], torch.tensor([rank]), hint=hint)
        assert oracle.same_bits(values[0], oracle.order_statistics([scores], rank)), f"rank {rank}"
        passes = [report.bytes_read for report in launches if report.kernel == "histogram_kernel"]
        found, keys = max(passes) <= ROOM, values.view(torch.int32)
        assert found == bool(((keys >= first) & (keys < first + bins)).all()), f"rank {rank}: found={found}"


# In a block of 1024 elements and 128 threads that read 8, 4 or 2 neighbours at once: each of the 8 elements of a
# thread, on several lanes and warps.
PLACES = (*range(248, 256), 510, 511, *range(764, 768), 1022, 1023)


def neighbours(launches: list[LaunchReport], dtype: torch.dtype, steady: bool, far: bool = False) -> None:
    """In each group one weight alone lies above the rank, at every place of a thread, in a tail and in a head.

    With the right hint and the widest brackets, or without one. Nearly all weights tie with the rank. far: the one has
    another first digit.
    """
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    four = torch.full((), 4.0, dtype=dtype).view(integer)  # whose exponent has its highest bit
    half = WIDEST // 2 >> {FLOAT32: 0, FLOAT16: 13, BFLOAT16: 16}.get(dtype, 0)
    steps = (0, half, 2 * half) if steady else (0, four.item() // 16 if far else 1, four.item() // 8)
    low, middle, high = ((four + step).view(dtype) for step in steps)
    second = 256 * 16 // dtype.itemsize  # elements of the CUDA kernels' first round, which are unrolled in twos
    lengths = {place: second + 9 if place < second else 1100 for place in PLACES}
    lengths |= {place + i * second: 3 * second + 9 for place in range(24, 32) for i in (1, 2)} | {-1: second + 9}
    listed = []
    for is_aligned, places in ((True, lengths), (False, dict.fromkeys([0, *PLACES], 1100))):
        for place, length in places.items():
            w = torch.full((length,), low.item(), dtype=dtype)
            w[::5], w[place], w[1] = high, middle, 0.25
            listed.append(w if is_aligned else samples.LAYOUTS["misaligned"](w))
    groups_at_once = 3 if steady else len(listed)  # as many as have the widest brackets
    for first in range(0, len(listed), groups_at_once):
        part = listed[first : first + groups_at_once]
        ranks = [int((w <= low).sum()) - 1 for w in part]
        values = torch.stack([oracle.order_statistics([oracle.scores(w)], r) for w, r in zip(part, ranks, strict=True)])
        launches.clear()
        with as_in_a_net_of(1 << 40):
            # around the upper value: the lower one is the bracket's first key, the next behind it
            hint = values[:, 1:].expand(-1, 2).contiguous() if steady else None
            found = ops.magnitude_select(part, list(range(len(part))), torch.tensor(ranks), hint=hint)
        assert oracle.same_bits(found, values)
        if steady:
            for report in launches:
                if report.kernel == "histogram_kernel":
                    most_bytes([report], 0)


def later_rows(launches: list[LaunchReport]) -> None:
    """The neighbour is the one key of a later row, which each warp sums once."""
    first = torch.ones(()).view(torch.int32).item() - 512
    places = [(5, ROW + WARP * warp + odd) for warp in range(ROW // WARP) for odd in (6, 7)]
    keys = first + torch.tensor(places, dtype=torch.int32)
    values = keys.view(torch.float32)
    launches.clear()
    with as_in_a_net_of(0):
        hint = torch.ones(len(values), 2)
        found = ops.magnitude_select(
            list(values), list(range(len(values))), torch.zeros(len(values), dtype=torch.int64), hint=hint
        )
    assert oracle.same_bits(found, values)
    for report in launches:
        if report.kernel == "histogram_kernel":
            most_bytes([report], 0)


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


def caps_decide(launches: list[LaunchReport]) -> None:
    """A neighbour that a cap takes away or just leaves, for ranks whose key ends at each place of a thread and warp.

    The first array's neighbour is in the next bin of the last digit, or under another prefix.
    """
    one = torch.ones(()).view(torch.int32).item()
    listed, caps, values = [], [], []
    for end in (1, 2, 3, 4, 230, 359, 488, 613, 742, 871, 1000):
        for beyond in (end + 1, end + 4096):
            keys = [[0, 0, end - 1, end, end, beyond, beyond + 9], [end - 1, end, beyond + 5]]
            pair = [(one + torch.tensor(own, dtype=torch.int32)).view(FLOAT32) for own in keys]
            for own_caps in itertools.product((5, 6), (2, 3)):
                listed, caps = [*listed, *pair], [*caps, *own_caps]
                values.append(oracle.order_statistics(pair, 6, list(own_caps)))
    groups = [i // 2 for i in range(len(listed))]
    found = ops.magnitude_select(listed, groups, torch.full((len(values),), 6), caps=torch.tensor(caps))
    assert oracle.same_bits(found, torch.stack(values))


SELECTIONS: dict[str, Callable[[], Selection]] = {
    "float32": lambda: Selection(weight_list(FLOAT32), [0, 0, 1, 1, 0, 2]),
    "many groups": lambda: Selection(list(torch.randn(150, 3, generator=seeded(4))), range(150)),
    "many groups, float64": lambda: Selection(list(torch.randn(130, 2, generator=seeded(4)).double()), range(130)),
    "empty groups": lambda: Selection(list(torch.randn(3, 40, generator=seeded(5))), [0, 2], empty_groups=1),
    "ties": lambda: Selection(weight_list(FLOAT32, coarse=True), [0] * 6),
    "bfloat16": lambda: Selection(weight_list(BFLOAT16), [0, 1, 0, 0, 1, 0]),
    "float16": lambda: Selection(weight_list(FLOAT16), [0, 1, 0, 0, 1, 0]),
    "mixed": lambda: Selection(weight_list(FLOAT32, BFLOAT16, FLOAT16), [0, 1, 0, 0, 1, 0]),
    "scaled": lambda: Selection(weight_list(FLOAT32), [0, 1, 0, 1, 1, 0], scales=[0.5, 3.0, 1.0, 0.1, 1.0, 1.7]),
    "bfloat16 ties": lambda: Selection(weight_list(BFLOAT16, coarse=True), [0, 1, 0, 0, 1, 0]),
    "dense": lambda: Selection(weight_list(FLOAT32, dense=True), [0, 1, 0, 0, 1, 0]),
    "dense, scaled": lambda: Selection(
        weight_list(FLOAT32, dense=True), [0, 1, 0, 1, 1, 0], scales=[0.5, 3.0, 0.5, 3.0, 3.0, 0.5]
    ),
    **{f"spread {str(dtype)[6:]}": partial(spread, dtype) for dtype in (FLOAT32, BFLOAT16, FLOAT16)},
    **{
        f"spread {str(dtype)[6:]}, scaled": partial(spread, dtype, scales=(0.5, 2.0, 1.0))
        for dtype in (BFLOAT16, FLOAT16)
    },
    "float64": lambda: Selection(weight_list(FLOAT64), [0, 1, 0, 0, 1, 0]),
    "float64, dense": lambda: Selection(weight_list(FLOAT64, dense=True), [0, 1, 0, 0, 1, 0]),
    "float64 scaled": lambda: Selection(weight_list(FLOAT64), [0, 1, 0, 1, 1, 0], scales=[0.5, 3, 1, 0.1, 1, 1.7]),
    "capped": lambda: Selection(weight_list(FLOAT32), [0, 1, 0, 1, 1, 0], caps=[5000, 1031, 0, 2, 4, 300]),
    "capped ties": lambda: Selection(
        weight_list(FLOAT32, coarse=True), [0, 1, 0, 1, 0, 1], caps=[900, 7, 0, 3, 2, 650]
    ),
    "capped, scaled": lambda: Selection(
        weight_list(FLOAT32), [0, 1, 0, 1, 1, 0], scales=[0.5, 3.0, 1.0, 0.1, 1.0, 1.7], caps=[5000, 800, 0, 2, 4, 300]
    ),
    "float64, capped": lambda: Selection(weight_list(FLOAT64), [0, 1, 0, 1, 1, 0], caps=[5000, 1031, 0, 2, 4, 300]),
}
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
    Case("later rows", later_rows),
    *(
        Case(f"neighbours: {str(dtype)[6:]}, steady", partial(neighbours, dtype=dtype, steady=True))
        for dtype in (FLOAT16, BFLOAT16, FLOAT32)
    ),
    *(
        Case(
            f"neighbours: {str(dtype)[6:]}, cold{', far' * far}",
            partial(neighbours, dtype=dtype, steady=False, far=far),
        )
        for dtype in samples.DTYPES
        for far in (False, True)
    ),
    Case("caps decide", caps_decide),
    *(
        Case(f"counts beyond 32 bits, {str(dtype)[6:]}", partial(counts_beyond_32_bits, dtype=dtype))
        for dtype in (FLOAT32, FLOAT64)
    ),
    Case("misled: float32", partial(misled, name="float32")),
    *(
        Case(f"edges of {bins} keys around {around}", partial(edges, around=around, bins=bins))
        for around, bins in ((1.0, 1 << 10), (0.0, 1 << 10), (INF, 1 << 10), (1.0, 1 << 14))
    ),
]
