"""Order statistics of sharded weights have the bits that one process finds."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from feather_kernels.backends.interface import Selection
from feather_kernels.sparsify.distributed.selection import ShardedWeights
from feather_kernels.sparsify.distributed.sharding import Part
from tests.distributed.processes import Processes

SHAPES = ((7, 3), (1, 5), (64, 33), (3, 2, 3, 3), (2, 0), (300, 40), (16, 16))
SPECIAL = (0.0, -0.0, math.inf, math.nan, 1e-42, -1e-42, 1.0, -1.0)


def make_weights(seed: int, shapes: tuple[tuple[int, ...], ...], dtype: torch.dtype, few_values: bool) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    if few_values:
        weights = [(w * 2).round() / 2 for w in weights]
    else:
        for w in weights:
            for index, value in enumerate(SPECIAL[: w.numel() // 4]):
                w.view(-1)[index * 3 % w.numel()] = value
    return [w.to(dtype) for w in weights]


def select_local(case: dict[str, Any], dims: list[int | None]) -> tuple[Tensor, Tensor]:
    """On each rank: the order statistics from its shards; a dimension of None is a weight that all ranks have."""
    import torch.distributed as dist

    rank, size = dist.get_rank(), dist.get_world_size()
    whole = make_weights(**case["weights"])
    local = [w if dim is None else _shard(w, dim, rank, size) for w, dim in zip(whole, dims, strict=True)]
    sharded = tuple(index for index, dim in enumerate(dims) if dim is not None)
    others = tuple(index for index, dim in enumerate(dims) if dim is None)
    cpu = torch.device("cpu")
    parts = [Part(sharded, dist.group.WORLD, cpu)] if sharded else []
    parts += [Part(others, None, cpu)] if others else []
    statistics = ShardedWeights(parts, 3)
    return statistics.select(Selection(local, **arguments(case))), statistics.norms(local, torch.float32)


def _shard(weight: Tensor, dim: int, rank: int, size: int) -> Tensor:
    """As FSDP2 and DTensor cut it: chunks of ceil(n / size), the last ones shorter or empty."""
    chunks = torch.chunk(weight, size, dim) if weight.shape[dim] else (weight,)
    return chunks[rank] if rank < len(chunks) else weight.narrow(dim, 0, 0)


def arguments(case: dict[str, Any]) -> dict[str, Any]:
    ranks, scales, caps = case["ranks"], case["scales"], case["caps"]
    return {
        "groups": case["groups"],
        "rank": torch.tensor(ranks),
        "scales": None if scales is None else torch.tensor(scales, dtype=case["compute_dtype"]),
        "caps": None if caps is None else torch.tensor(caps),
    }


@st.composite
def cases(draw: st.DrawFn) -> tuple[dict[str, Any], list[int | None]]:
    shapes = tuple(draw(st.lists(st.sampled_from(SHAPES), min_size=1, max_size=5)))
    dims = [draw(st.sampled_from([None, *range(len(shape))])) for shape in shapes]
    dtype = draw(st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64]))
    group_count = draw(st.integers(1, 3))
    groups = [draw(st.integers(0, group_count - 1)) for _ in shapes]
    numels = [math.prod(shape) for shape in shapes]
    caps = [draw(st.integers(0, n)) for n in numels] if draw(st.booleans()) else None
    available = [
        sum((caps or numels)[index] for index, other in enumerate(groups) if other == group)
        for group in range(group_count)
    ]
    ranks = [draw(st.integers(-1, max(count, 0))) for count in available]  # also those outside
    scales = [draw(st.floats(0.0, 3.0)) for _ in shapes] if draw(st.booleans()) else None
    weights = {"seed": draw(st.integers(0, 9)), "shapes": shapes, "dtype": dtype, "few_values": draw(st.booleans())}
    compute_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    case = {"weights": weights, "groups": groups, "ranks": ranks, "scales": scales, "caps": caps}
    return {**case, "compute_dtype": compute_dtype}, dims


@pytest.mark.parametrize("world", [2, 4])
def test_every_rank_selects_the_bits_of_one_process(processes: Processes, world: int) -> None:
    @settings(max_examples=40, deadline=None)
    @given(cases())
    def check(drawn: tuple[dict[str, Any], list[int | None]]) -> None:
        case, dims = drawn
        weights = make_weights(**case["weights"])
        wanted = torch.ops.feather_kernels.magnitude_select(weights, **arguments(case))
        norms = torch.stack([torch.linalg.vector_norm(w, dtype=torch.float64) for w in weights]).float()
        for found, found_norms in processes.run(select_local, case, dims, world=world):
            assert found.view(torch.uint8).equal(wanted.view(torch.uint8)), (found, wanted)
            torch.testing.assert_close(found_norms, norms, equal_nan=True, rtol=1e-6, atol=0)

    check()


def select_near(cases: list[dict[str, Any]], backend: str) -> list[tuple[Tensor, Tensor, int]]:
    """On each rank, for every case the result of a search from scratch, of one with a hint, and the sums of that."""
    import torch.distributed as dist

    import feather_kernels as fk
    from feather_kernels.sparsify.distributed import selection

    sums = []
    original = selection.add_over_processes

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        sums.append(args[0].numel())
        return original(*args, **kwargs)

    found = []
    selection.add_over_processes = counted
    try:
        for case in cases:
            local = [_shard(w, 0, dist.get_rank(), dist.get_world_size()) for w in make_weights(**case["weights"])]
            part = Part(tuple(range(len(local))), dist.group.WORLD, torch.device("cpu"))
            statistics = ShardedWeights([part], 0)
            with fk.use_backend(backend):
                first = statistics.select(Selection(local, **arguments(case)))
                sums.clear()
                hint = first * torch.tensor(case["drift"]) if case["hint"] is None else torch.tensor(case["hint"])
                near = statistics.select(Selection(local, hint=hint.float(), **arguments(case)))
                found.append((first, near, len(sums)))
    finally:
        selection.add_over_processes = original
    return found


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_a_hint_saves_sums_and_never_changes_the_result(processes: Processes, backend: str) -> None:
    shapes = ((300, 40), (64, 33), (7, 3), (2, 0))
    drifts = {1.0: 2, 1.0001: 2, 0.9999: 2, 1.01: 4, 0.5: 4}  # of the hint -> sums: one is wasted where it is too far
    cases, wanted_sums = [], []
    for few_values in (False, True):
        for groups, ranks in (([0, 0, 0, 0], [9000]), ([0, 1, 0, 0], [7000, 1000]), ([0, 1, 0, 2], [9000, -1, 3])):
            for drift, sums in drifts.items():
                weights = {"seed": 1, "shapes": shapes, "dtype": torch.float32, "few_values": few_values}
                case = {"weights": weights, "groups": groups, "ranks": ranks, "scales": [1.0, 2.0, 0.5, 1.0]}
                cases.append({**case, "caps": None, "compute_dtype": torch.float32, "drift": drift, "hint": None})
                wanted_sums.append(None if few_values or 3 in ranks else sums)
    base = cases[0]
    nan, inf = [[math.nan] * 2], [[math.inf] * 2]
    for hint, ranks in ((nan, [9000]), ([[0.0, 0.0]], [9000]), (inf, [14131]), (None, [14132]), (None, [14133])):
        cases.append({**base, "hint": hint, "ranks": ranks})
        wanted_sums.append(None)
    for rank_found in processes.run(select_near, cases, backend):
        for case, (first, near, sums), expected in zip(cases, rank_found, wanted_sums, strict=True):
            whole = make_weights(**case["weights"])
            wanted = torch.ops.feather_kernels.magnitude_select(whole, **arguments(case))
            assert first.view(torch.int32).equal(wanted.view(torch.int32))
            assert near.view(torch.int32).equal(wanted.view(torch.int32)), (case, near, wanted)
            assert expected is None or sums == expected, (case["drift"], sums)
