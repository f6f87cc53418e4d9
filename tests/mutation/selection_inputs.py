"""The inputs of the selection checks: lists of weights with groups, scales and caps, and the result of sorting them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from tests.mutation.cases import BFLOAT16, FLOAT16, FLOAT32, FLOAT64
from tests.mutation.lists import seeded, weight_list
from tests.support import oracle, samples

ops = torch.ops.feather_kernels


SCALES = (0.5, 3.0, 1.0, 0.1, 1.0, 1.7)


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


def scaled_ties(dtype: torch.dtype) -> Selection:
    """Few distinct values, so that every place of a thread meets the digits of the rank in every pass."""
    return Selection(weight_list(dtype, coarse=True), [0, 1, 0, 1, 1, 0], scales=SCALES)


def digits(dtype: torch.dtype) -> Selection:
    """Capped pairs of short tensors, so many that in every pass the ranks' digits are all over the bins."""
    integer = oracle.INTEGERS[dtype.itemsize]
    least, most = (torch.tensor(value, dtype=dtype).view(integer).item() for value in (1e-9, 1e9))
    keys = torch.randint(least, most, (120, 6), generator=seeded(9), dtype=integer)
    return Selection(list(keys.view(dtype)), [i // 2 for i in range(120)], caps=[4, 5])


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
        compute = oracle.compute_dtype(self.listed[0].dtype)
        return ops.magnitude_select(
            self.listed,
            self.groups,
            torch.tensor(ranks),
            scales=None if self.scales is None else torch.tensor(self.scales, dtype=compute),
            caps=None if self.caps is None else torch.tensor(self.caps),
            hint=hint,
        )


SELECTIONS: dict[str, Callable[[], Selection]] = {
    "float32": lambda: Selection(weight_list(FLOAT32), [0, 0, 1, 1, 0, 2]),
    "many groups": lambda: Selection(list(torch.randn(150, 3, generator=seeded(4))), range(150)),
    "many groups, float64": lambda: Selection(list(torch.randn(130, 2, generator=seeded(4)).double()), range(130)),
    "empty groups": lambda: Selection(list(torch.randn(3, 40, generator=seeded(5))), [0, 2], empty_groups=1),
    "ties": lambda: Selection(weight_list(FLOAT32, coarse=True), [0] * 6),
    "bfloat16": lambda: Selection(weight_list(BFLOAT16), [0, 1, 0, 0, 1, 0]),
    "float16": lambda: Selection(weight_list(FLOAT16), [0, 1, 0, 0, 1, 0]),
    "mixed": lambda: Selection(weight_list(FLOAT32, BFLOAT16, FLOAT16), [0, 1, 0, 0, 1, 0]),
    "scaled": lambda: Selection(weight_list(FLOAT32), [0, 1, 0, 1, 1, 0], scales=SCALES),
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
    "float64 scaled": lambda: Selection(weight_list(FLOAT64), [0, 1, 0, 1, 1, 0], scales=SCALES),
    "capped": lambda: Selection(weight_list(FLOAT32), [0, 1, 0, 1, 1, 0], caps=[5000, 1031, 0, 2, 4, 300]),
    "capped ties": lambda: Selection(
        weight_list(FLOAT32, coarse=True), [0, 1, 0, 1, 0, 1], caps=[900, 7, 0, 3, 2, 650]
    ),
    "capped, scaled": lambda: Selection(
        weight_list(FLOAT32), [0, 1, 0, 1, 1, 0], scales=SCALES, caps=[5000, 800, 0, 2, 4, 300]
    ),
    **{
        f"{str(dtype)[6:]} ties, scaled": partial(scaled_ties, dtype) for dtype in (FLOAT16, BFLOAT16, FLOAT32, FLOAT64)
    },
    **{f"digits, {str(dtype)[6:]}, capped": partial(digits, dtype) for dtype in (FLOAT32, FLOAT64)},
    "float64, capped": lambda: Selection(weight_list(FLOAT64), [0, 1, 0, 1, 1, 0], caps=[5000, 1031, 0, 2, 4, 300]),
}


@cache
def selection(name: str) -> tuple[Selection, list[tuple[list[int], Tensor]]]:
    """A selection by its name, and its calls with their results."""
    made = SELECTIONS[name]()
    return made, made.expected()
