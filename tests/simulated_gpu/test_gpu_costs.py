"""The arithmetic of tools/gpu_costs.py, which computes the table of docs/gpu-costs.md."""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed")

from tools.gpu_costs import (
    DEVICES,
    WEIGHTS,
    Cost,
    microseconds,
    occupancy,
    page,
    slower_than_a_copy,
    whole_block_instructions,
)

A100, H100, _ = DEVICES


def cost(registers: int = 32, threads: int = 128, shared: int = 0, **counts: float) -> Cost:
    counts = {"read": 0, "written": 0, "instructions": 0, "float32": 0, "float64": 0, **counts}
    return Cost(sass=True, registers=registers, threads=threads, shared=shared, **counts)


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        ({"registers": 32}, 1.0),
        ({"registers": 33}, 12 * 4 / 64),  # 40 registers are allocated: 51 warps, 12 programs of 4
        ({"registers": 64}, 0.5),
        ({"registers": 16, "threads": 32}, 0.5),  # 32 programs at most
        ({"shared": 40 << 10}, 4 * 4 / 64),  # of 164 KB on an A100, 41 KB each
    ],
)
def test_occupancy(resources: dict[str, int], expected: float) -> None:
    assert occupancy(cost(**resources), A100) == expected


def test_time_is_bound_by_the_busiest_part() -> None:
    by_bytes, by_instructions = microseconds(cost(read=4, written=4, instructions=128), A100)
    assert by_bytes == pytest.approx(WEIGHTS * 8 / 2.0e12 * 1e6)
    assert by_instructions == pytest.approx(WEIGHTS / (108 * 1.41e9) * 1e6)
    for bound in ({"float32": 128, "instructions": 128}, {"float64": 64, "instructions": 64}):
        assert microseconds(cost(**bound), A100)[1] == pytest.approx(2 * by_instructions)
        assert microseconds(cost(**bound), H100)[1] == pytest.approx(by_instructions * 108 * 1.41 / (132 * 1.71))


SASS = """
.text.kernel:
        /*0000*/                   ISETP.GT.AND P0, PT, R0, UR7, PT ;
        /*0010*/              @!P0 BRA `(.L_x_0) ;
        /*0020*/              @!P1 STG.E desc[UR4][R2.64], R0 ;
        /*0030*/                   EXIT ;
.L_x_0:
        /*0040*/                   LDG.E.128 R8, desc[UR4][R8.64] ;
        /*0050*/                   STG.E.128 desc[UR4][R14.64], R8 ;
        /*0060*/                   EXIT ;
.L_x_1:
        /*0070*/                   BRA `(.L_x_1);
"""


def test_instructions_of_a_whole_block() -> None:
    assert whole_block_instructions(SASS) == 5
    assert whole_block_instructions(SASS.replace("STG.E.128", "STG.E")) is None
    loop = SASS.replace("LDG.E.128 R8, desc[UR4][R8.64]", "@P0 BRA `(.L_x_0)")
    assert whole_block_instructions(loop) == 5, "a loop ends after its first turn"


def test_the_page_has_a_row_for_each_case_and_names_what_cannot_reach_a_copy() -> None:
    copying = [cost(read=4, written=4, instructions=1)] * 3
    computing = [cost(read=4, written=4, instructions=count) for count in (32, 70, 96)]
    rows = {"a copy": copying, "a long formula": computing}
    assert slower_than_a_copy(rows).splitlines() == [
        "- A100 80GB: none",
        "- H100 SXM: a long formula",
        "- B200: a long formula",
    ]
    lines = page(rows, launches=13).splitlines()
    (row,) = [line for line in lines if line.startswith("| a long formula |")]
    assert row.startswith("| a long formula | 4.00 + 4.00 | 70.0 SASS | 32/32/32 | 100%/100%/100% | 102, ")
    assert max(map(len, (line for line in lines if not line.startswith("|")))) <= 120
