"""The executor itself: threads, memory, planted bugs, Triton's JIT. test_arithmetic.py has its arithmetic."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tools.ptx_executor import (
    BarrierDeadlockError,
    ConvergenceError,
    DataRaceError,
    EndlessLoopError,
    MisalignedError,
    Options,
    OutOfBoundsError,
    UnknownInstructionError,
    execution,
)
from tools.ptx_executor.exact import edge_floats
from tools.ptx_executor.snippets import run_kernel

ARCHITECTURES = (80, 90, 100, 120)
# -- control flow, barriers, warps -------------------------------------------------------------------------------------
LANE = "mov.u32 %r0, %tid.x; mul.wide.u32 %rd9, %r0, 4; add.s64 %rd10, %rd0, %rd9;"
SHARED = ".shared .align 16 .b8 buffer[1024];"


def test_predicated_and_divergent_lanes_meet_again() -> None:
    out = np.zeros(64, np.uint32)
    body = f"""{LANE}
    and.b32 %r1, %r0, 1;
    setp.eq.b32 %p1, %r1, 0;
    mov.u32 %r2, 7;
    @!%p1 mov.u32 %r2, 9;
    @%p1 bra $EVEN;
    add.u32 %r2, %r2, 100;
    bra $DONE;
    $EVEN: mov.u32 %r3, 0;
    $LOOP: add.u32 %r2, %r2, 1;
    add.u32 %r3, %r3, 1;
    setp.lt.u32 %p2, %r3, %r0;
    @%p2 bra $LOOP;
    $DONE: activemask.b32 %r4;
    setp.ne.u32 %p3, %r4, -1;
    @%p3 trap;
    st.global.u32 [%rd10], %r2;"""
    run_kernel(body, out, threads=64)
    assert out.tolist() == [109 if i % 2 else 7 + max(1, i) for i in range(64)]


@pytest.mark.parametrize("barrier", [True, False])
def test_missing_barrier_is_a_race(barrier: bool) -> None:
    out = np.zeros(128, np.uint32)
    body = f"""{LANE}
    mov.u32 %r1, buffer;
    shl.b32 %r2, %r0, 2;
    add.u32 %r3, %r1, %r2;
    st.shared.u32 [%r3], %r0;
    {"bar.sync 0;" if barrier else ""}
    xor.b32 %r2, %r2, 508;
    add.u32 %r3, %r1, %r2;
    ld.shared.u32 %r4, [%r3];
    st.global.u32 [%rd10], %r4;"""
    if barrier:
        run_kernel(body, out, threads=128, declarations=SHARED)
        assert out.tolist() == list(range(127, -1, -1))
    else:
        with pytest.raises(DataRaceError, match=r"kernel snippet.*`ld\.shared\.u32 %r4, \[%r3\]` races with program 0"):
            run_kernel(body, out, threads=128, declarations=SHARED)


def test_warp_barrier_orders_one_warp_only() -> None:
    body = f"""{LANE}
    mov.u32 %r1, buffer;
    shl.b32 %r2, %r0, 2;
    add.u32 %r3, %r1, %r2;
    st.shared.u32 [%r3], %r0;
    bar.warp.sync -1;
    xor.b32 %r2, %r2, MASK;
    add.u32 %r3, %r1, %r2;
    ld.shared.u32 %r4, [%r3];
    st.global.u32 [%rd10], %r4;"""
    out = np.zeros(64, np.uint32)
    run_kernel(body.replace("MASK", "4"), out, threads=64, declarations=SHARED)
    assert out.tolist() == [i ^ 1 for i in range(64)]
    with pytest.raises(DataRaceError):
        run_kernel(body.replace("MASK", "128"), out, threads=64, declarations=SHARED)


def test_write_after_several_readers_is_a_race() -> None:
    out = np.zeros(64, np.uint32)
    body = f"""{LANE}
    ld.global.u32 %r1, [%rd0];
    setp.eq.u32 %p1, %r0, 5;
    @%p1 st.global.u32 [%rd0], 1;"""
    with pytest.raises(DataRaceError, match="thread 5"):
        run_kernel(body, out, threads=64)


def test_a_barrier_that_some_skip_is_a_deadlock() -> None:
    body = "mov.u32 %r0, %tid.x; setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 1; @!%p1 bar.sync 2;"
    with pytest.raises(BarrierDeadlockError, match=r"64 threads wait forever at .*bar\.sync 1"):
        run_kernel(body, threads=64)


@pytest.mark.parametrize(
    ("mode", "operand", "source"),
    [
        ("bfly", 5, lambda i: i ^ 5),
        ("down", 3, lambda i: i + 3 if i + 3 < 32 else i),
        ("up", 3, lambda i: i - 3 if i >= 3 else i),
        ("idx", 11, lambda i: 11),
    ],
)
def test_shuffles(mode: str, operand: int, source: Callable[[int], int]) -> None:
    out = np.zeros(64, np.uint32)
    clamp = 0 if mode == "up" else 31
    run_kernel(
        f"{LANE} shfl.sync.{mode}.b32 %r1|%p1, %r0, {operand}, {clamp}, -1; st.global.u32 [%rd10], %r1;",
        out,
        threads=64,
    )
    assert out.tolist() == [source(i % 32) + i // 32 * 32 for i in range(64)]


def test_shuffle_from_an_absent_lane() -> None:
    body = f"{LANE} setp.lt.u32 %p1, %r0, 16; @%p1 shfl.sync.bfly.b32 %r1, %r0, 16, 31, -1;"
    with pytest.raises(ConvergenceError, match="reads lane 16"):
        run_kernel(body, np.zeros(32, np.uint32))


def test_a_warp_instruction_waits_for_a_lane_that_comes_back_in_a_loop() -> None:
    """Lane 0 takes a way round, behind the others in time and ahead of them in the code."""
    out = np.zeros(32, np.uint32)
    body = f"""{LANE}
    mov.u32 %r2, 0; mov.u32 %r4, 0; mov.u32 %r5, 100;
    $AGAIN:
    shfl.sync.idx.b32 %r3, %r5, 0, 31, -1;
    add.u32 %r4, %r4, %r3;
    add.u32 %r2, %r2, 1;
    setp.eq.u32 %p1, %r2, 3;
    @%p1 bra $END;
    setp.ne.u32 %p2, %r0, 0;
    @%p2 bra $AGAIN;
    add.u32 %r5, %r5, 1;
    bra.uni $AGAIN;
    $END:
    st.global.u32 [%rd10], %r4;"""
    run_kernel(body, out)
    assert (out == 100 + 101 + 102).all()


def test_a_warp_instruction_goes_on_when_the_last_missing_lane_has_exited() -> None:
    """Half of the lanes wait at a loop's head for the others, these further down for one that leaves."""
    out = np.zeros(32, np.uint32)
    body = f"""{LANE}
    mov.u32 %r2, 0;
    $AGAIN:
    shfl.sync.idx.b32 %r3, %r0, 3, 31, 65535;
    setp.eq.u32 %p1, %r0, 31;
    @%p1 exit;
    setp.ge.u32 %p2, %r0, 16;
    @%p2 bra $LATE;
    add.u32 %r2, %r2, 1;
    setp.lt.u32 %p3, %r2, 3;
    @%p3 bra $AGAIN;
    bra.uni $END;
    $LATE:
    shfl.sync.idx.b32 %r3, %r0, 20, 31, -65536;
    $END:
    st.global.u32 [%rd10], %r3;"""
    body = body.replace("$AGAIN:\n    shfl", "setp.ge.u32 %p4, %r0, 16;\n    $AGAIN:\n    @!%p4 shfl")
    run_kernel(body, out)
    assert out.tolist() == [3] * 16 + [20] * 15 + [0]


@pytest.mark.parametrize("instruction", ["shfl.sync.idx.b32 %r1, %r0, 5, 31, -1;", "bar.warp.sync -1;"])
def test_lanes_of_a_mask_that_never_come_are_reported(instruction: str) -> None:
    """On a device this hangs."""
    body = f"""{LANE} setp.lt.u32 %p1, %r0, 16; @!%p1 bra $OTHERS; {instruction} $OTHERS: bar.sync 0;"""
    with pytest.raises(ConvergenceError, match="waits for lanes of its mask that never come"):
        run_kernel(body, np.zeros(32, np.uint32))


def test_what_was_never_written_is_no_zero() -> None:
    out = np.zeros(32, np.uint32)
    run_kernel(f"{LANE} selp.u32 %r2, 1, 0, %p3; add.u32 %r2, %r2, %r7; st.global.u32 [%rd10], %r2;", out)
    assert set(out.tolist()) == {0xFFFFFFFF, 0}


def test_a_warp_instruction_does_not_wait_for_lanes_outside_of_its_mask() -> None:
    out = np.zeros(32, np.uint32)
    body = f"""{LANE}
    setp.lt.u32 %p1, %r0, 16;
    @!%p1 bra $OTHERS;
    shfl.sync.idx.b32 %r1, %r0, 5, 31, 65535;
    bra.uni $END;
    $OTHERS:
    shfl.sync.idx.b32 %r1, %r0, 21, 31, -65536;
    $END:
    st.global.u32 [%rd10], %r1;"""
    run_kernel(body, out)
    assert out.tolist() == [5] * 16 + [21] * 16


def test_lanes_of_a_shuffle_wait_for_those_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "RANDOM_EVERY", 1)  # any thread may run ahead
    out = np.zeros(32, np.uint32)
    body = f"""{LANE}
    mov.u32 %r2, 0;
    $LOOP: add.u32 %r2, %r2, 1;
    setp.lt.u32 %p1, %r2, %r0;
    @%p1 bra $LOOP;
    shfl.sync.bfly.b32 %r1, %r2, 1, 31, -1;
    st.global.u32 [%rd10], %r1;"""
    run_kernel(body, out)
    assert out.tolist() == [max(1, i ^ 1) for i in range(32)]


def test_a_spinning_thread_starves_nobody() -> None:
    state = np.zeros(2, np.uint32)
    body = """$LOCK: atom.global.cas.b32 %r1, [%rd0], 0, 1;
    setp.ne.u32 %p1, %r1, 0;
    @%p1 bra $LOCK;
    ld.global.u32 %r2, [%rd0+4];
    add.u32 %r2, %r2, 1;
    st.global.u32 [%rd0+4], %r2;
    atom.global.exch.b32 %r1, [%rd0], 0;"""
    run_kernel(body, state, threads=1, grid=4, options=Options(races=False))
    assert state.tolist() == [0, 4]


def test_matrix_fragments() -> None:
    out = np.zeros(32, np.uint32)
    body = f"""{LANE}
    mov.u32 %r1, buffer;
    shl.b32 %r2, %r0, 4;
    add.u32 %r3, %r1, %r2;
    stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r3], {{%r0}};
    bar.sync 0;
    ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {{%r4}}, [%r3];
    st.global.u32 [%rd10], %r4;"""
    run_kernel(body, out, declarations=SHARED)
    matrix = np.zeros((8, 8), np.uint32)  # lane l stores (l, 0) at row l / 4, columns 2 (l % 4) and the next
    matrix[:, ::2] = np.arange(32).reshape(8, 4)
    lane = np.arange(32)
    low, high = (matrix[lane % 4 * 2 + half, lane // 4] for half in range(2))
    assert out.tolist() == (low | high << 16).tolist()


def test_asynchronous_copy_pads_with_zeros() -> None:
    source, out = np.arange(1, 33, dtype=np.uint32), np.zeros(32, np.uint32)
    body = """mov.u32 %r0, %tid.x; mul.wide.u32 %rd9, %r0, 4; add.s64 %rd10, %rd1, %rd9; add.s64 %rd11, %rd0, %rd9;
    mov.u32 %r1, buffer; shl.b32 %r2, %r0, 2; add.u32 %r3, %r1, %r2;
    setp.lt.u32 %p1, %r0, 20; selp.b32 %r4, 4, 0, %p1;
    cp.async.ca.shared.global [%r3], [%rd11], 4, %r4;
    cp.async.commit_group; cp.async.wait_group 0; bar.sync 0;
    ld.shared.u32 %r5, [%r3]; st.global.u32 [%rd10], %r5;"""
    report = run_kernel(body, source, out, declarations=SHARED)
    assert out.tolist() == [*range(1, 21), *[0] * 12]
    assert report.bytes_read == 80


def test_votes_and_warp_reductions() -> None:
    out = np.zeros((4, 64), np.uint32)
    body = f"""{LANE}
    setp.lt.u32 %p1, %r0, 40;
    vote.sync.ballot.b32 %r1, %p1, -1;
    vote.sync.all.pred %p2, %p1, -1;
    selp.u32 %r2, 1, 0, %p2;
    redux.sync.add.u32 %r3, %r0, -1;
    redux.sync.max.s32 %r4, %r0, -1;
    st.global.u32 [%rd10], %r1;
    st.global.u32 [%rd10+256], %r2;
    st.global.u32 [%rd10+512], %r3;
    st.global.u32 [%rd10+768], %r4;"""
    run_kernel(body, out, threads=64)
    assert out[:, 0].tolist() == [2**32 - 1, 1, 496, 31]
    assert out[:, 32].tolist() == [2**8 - 1, 0, 1520, 63]


# -- memory ------------------------------------------------------------------------------------------------------------
def test_atomics_return_each_value_once() -> None:
    state, out = np.zeros(4, np.uint32), np.zeros(64, np.uint32)
    body = """mov.u32 %r0, %tid.x; mul.wide.u32 %rd9, %r0, 4; add.s64 %rd10, %rd1, %rd9;
    atom.global.add.u32 %r1, [%rd0], 3;
    st.global.u32 [%rd10], %r1;
    red.global.max.s32 [%rd0+4], %r0;
    red.global.or.b32 [%rd0+8], %r0;
    atom.global.inc.u32 %r2, [%rd0+12], 9;"""
    report = run_kernel(body, state, out, threads=64)
    assert sorted(out.tolist()) == list(range(0, 192, 3))
    assert state.tolist() == [192, 63, 63, 64 % 10]
    assert (report.bytes_read, report.bytes_written) == (16, 16 + 256)


def test_compare_and_swap_takes_turns() -> None:
    state, out = np.zeros(1, np.uint32), np.zeros(32, np.uint32)
    body = """mov.u32 %r0, %tid.x; mul.wide.u32 %rd9, %r0, 4; add.s64 %rd10, %rd1, %rd9; add.u32 %r2, %r0, 1;
    atom.global.cas.b32 %r1, [%rd0], 0, %r2; st.global.u32 [%rd10], %r1;"""
    run_kernel(body, state, out)
    assert (out == 0).sum() == 1
    assert out[out != 0].tolist() == [int(state[0])] * 31


def test_vector_access_counts_bytes_and_moves_lanes() -> None:
    source, target = np.arange(128, dtype=np.uint32), np.zeros(128, np.uint32)
    body = """mov.u32 %r0, %tid.x; mul.wide.u32 %rd9, %r0, 16; add.s64 %rd10, %rd0, %rd9; add.s64 %rd11, %rd1, %rd9;
    ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd10];
    st.global.v4.b32 [%rd11], {%r4, %r3, %r2, %r1};"""
    report = run_kernel(body, source, target)
    assert target.reshape(-1, 4)[:, ::-1].ravel().tolist() == source.tolist()
    assert (report.bytes_read, report.bytes_written) == (512, 512)


def test_narrow_accesses_are_those_of_global_memory_below_16_bytes() -> None:
    body = f"""{LANE} mov.u32 %r1, buffer;
    ld.global.v4.b32 {{%r2, %r3, %r4, %r5}}, [%rd0];
    ld.global.v2.b32 {{%r2, %r3}}, [%rd0];
    ld.global.b32 %r2, [%rd0];
    setp.lt.u32 %p1, %r0, 8;
    @%p1 st.global.u32 [%rd10], %r2;
    st.shared.u32 [%r1], %r2;"""
    options = Options(races=False)
    report = run_kernel(body, np.zeros(64, np.uint32), grid=2, declarations=SHARED, options=options)
    assert report.threads == 64
    assert report.narrow_accesses == 64 + 64 + 2 * 8


def test_atomics_are_those_of_global_memory_where_the_guard_is_true() -> None:
    body = f"""{LANE} mov.u32 %r1, buffer; setp.lt.u32 %p1, %r0, 8;
    @%p1 atom.global.add.u32 %r2, [%rd0], 1;
    @%p1 red.global.add.u32 [%rd0], 1;
    atom.shared.add.u32 %r2, [%r1], 1;"""
    total = np.zeros(1, np.uint32)
    report = run_kernel(body, total, grid=2, declarations=SHARED)
    assert report.global_atomics == total[0] == 2 * (8 + 8)


def test_a_scalar_that_all_threads_read_counts_once() -> None:
    report = run_kernel("ld.global.u32 %r1, [%rd0];", np.zeros(4, np.uint32), threads=128, grid=3)
    assert report.bytes_read == 3 * 4


@pytest.mark.parametrize(
    ("body", "error", "message"),
    [
        (
            "st.global.u32 [%rd0+64], 1;",
            OutOfBoundsError,
            r"kernel snippet: program 0 thread 0: `st\.global.*` writes 4",
        ),
        ("ld.global.u32 %r1, [%rd0+-4];", OutOfBoundsError, "reads 4 bytes at 0x.*its byte -4 of 64"),
        ("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [%rd0+8];", MisalignedError, r"16-byte global access at 0x.*8$"),
        ("ld.shared.u32 %r1, [1024];", OutOfBoundsError, "shared address 0x400 of 1024 bytes"),
        ("mov.u32 %r0, %tid.x; st.global.u32 [%rd0], %r0;", DataRaceError, r"st\.global\.u32 \[%rd0\], %r0"),
        ("wgmma.fence.sync.aligned;", UnknownInstructionError, "opcode wgmma is not implemented"),
        ("add.rz.f64 %rd1, %rd2, %rd3;", UnknownInstructionError, r"add with modifier \.rz"),
        ("fma.rn.e4m3x2 %r1, %r2, %r3, %r4;", UnknownInstructionError, r"modifier \.e4m3x2"),
        ("add.u32 %r1, %oops, 1;", UnknownInstructionError, "operand `%oops`"),
        ("$L: bra $L;", EndlessLoopError, "snippet"),
    ],
)
def test_planted_bugs_are_named(
    body: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(execution, "MAX_STEPS", 1000)
    aligned = np.zeros(64 + 16, np.uint32)
    start = -aligned.ctypes.data % 64 // 4
    with pytest.raises(error, match=message):
        run_kernel(body, aligned[start : start + 16], declarations=SHARED)


def test_uninitialised_shared_memory_is_nan() -> None:
    out = np.zeros(32, np.float32)
    run_kernel(f"{LANE} ld.shared.f32 %r1, [16]; st.global.f32 [%rd10], %r1;", out, declarations=SHARED)
    assert np.isnan(out).all()


# -- Triton ------------------------------------------------------------------------------------------------------------
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"), reason="TRITON_INTERPRET is set: nothing is compiled"
)


@pytest.fixture(params=ARCHITECTURES, ids=lambda arch: f"sm_{arch}")
def gpu(request: pytest.FixtureRequest) -> Iterator[Any]:
    from tools.ptx_executor.driver import simulated_gpu

    with simulated_gpu(request.param) as driver:
        yield driver


@needs_triton
@needs_compiler
class TestTriton:
    """Small kernels through the JIT; results equal to torch, bytes equal to the minimum."""

    @pytest.mark.parametrize("numel", [1, 127, 4096, 5001])
    def test_copy_with_a_masked_tail(self, gpu: Any, numel: int) -> None:
        from tools.ptx_executor import sample_kernels

        source, target = torch.randn(numel), torch.full((numel,), 7.0)
        sample_kernels.copy[(-(-numel // 1024),)](source, target, numel, BLOCK=1024)
        assert target.equal(source)
        assert (gpu.launches[-1].bytes_read, gpu.launches[-1].bytes_written) == (4 * numel, 4 * numel)

    def test_misaligned_views_take_the_scalar_path(self, gpu: Any) -> None:
        from tools.ptx_executor import sample_kernels

        source, target = torch.randn(1001)[1:], torch.zeros(1003)[3:]
        sample_kernels.copy[(1,)](source, target, 1000, BLOCK=1024)
        assert target.equal(source)
        assert not any(".v4" in name for name in gpu.launches[-1].instructions)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    def test_cast_rounds_as_torch(self, gpu: Any, dtype: torch.dtype) -> None:
        from tools.ptx_executor import sample_kernels

        source = torch.from_numpy(edge_floats("f32", 4000, 1))
        target = torch.zeros(4000, dtype=dtype)
        sample_kernels.cast[(4,)](source, target, 4000, BLOCK=1024)
        assert torch.equal(target.nan_to_num(0.25), source.to(dtype).nan_to_num(0.25))
        assert (gpu.launches[-1].bytes_read, gpu.launches[-1].bytes_written) == (16000, 8000)

    def test_sum(self, gpu: Any) -> None:
        from tools.ptx_executor import sample_kernels

        source = torch.randint(-1000, 1000, (5, 2048)).float()  # every order gives the same sum
        sums = torch.zeros(5)
        sample_kernels.sum_rows[(5,)](source, sums, 2048)
        assert sums.equal(source.sum(1))
        assert (gpu.launches[-1].bytes_read, gpu.launches[-1].bytes_written) == (source.numel() * 4, 20)

    def test_histogram(self, gpu: Any) -> None:
        from tools.ptx_executor import sample_kernels

        source, counts = torch.randint(0, 64, (3000,), dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
        sample_kernels.histogram[(3,)](source, counts, 3000, BINS=64, BLOCK=1024)
        assert counts.equal(torch.bincount(source, minlength=64).int())
        report = gpu.launches[-1]
        assert (report.bytes_read, report.bytes_written) == (12000 + 3 * 256, 3 * 256)

    def test_pointer_table(self, gpu: Any) -> None:
        from tools.ptx_executor import sample_kernels

        tensors = [torch.randn(n) for n in (1, 100, 777, 1024)]
        doubled = [t * 2 for t in tensors]
        pointers, numels = (torch.tensor(v) for v in ([t.data_ptr() for t in tensors], [t.numel() for t in tensors]))
        with pytest.raises(OutOfBoundsError, match=r"double_in_table.*reads"):
            sample_kernels.double_in_table[(4,)](pointers, numels, BLOCK=256)
        gpu.expose(t.view(1, -1) for t in tensors)  # views: it is their memory that must live
        sample_kernels.double_in_table[(4,)](pointers, numels, BLOCK=256)
        assert all(map(torch.equal, tensors, doubled))
        assert gpu.launches[-1].bytes_read - 64 == gpu.launches[-1].bytes_written == 4 * sum(map(torch.numel, tensors))
        with pytest.raises(OutOfBoundsError, match=r"double_in_table.*reads 4 bytes"):
            sample_kernels.double_in_table[(4,)](pointers, numels + 1, BLOCK=256)
        tensors.pop(2)
        with pytest.raises(OutOfBoundsError, match=r"double_in_table: program 2 .*reads"):
            sample_kernels.double_in_table[(4,)](pointers, numels, BLOCK=256)

    def test_planted_bugs(self, gpu: Any) -> None:
        from tools.ptx_executor import sample_kernels

        source = torch.rand(1000)
        with pytest.raises(OutOfBoundsError, match=r"store_without_mask: program 3 .*`.*st\.global.* writes"):
            sample_kernels.store_without_mask[(4,)](source, torch.zeros(1000), 1000, BLOCK=256)
        with pytest.raises(DataRaceError, match=r"sum_without_atomic.*races with program"):
            sample_kernels.sum_without_atomic[(4,)](source, torch.zeros(1), 1000, BLOCK=256)
        sample_kernels.sum_without_atomic[(1,)](source, torch.zeros(1), 1000, BLOCK=1024)

    def test_the_driver_compiles_for_its_own_architecture(self, gpu: Any) -> None:
        from tools.ptx_executor import sample_kernels

        compiled = sample_kernels.copy[(1,)](torch.zeros(16), torch.zeros(16), 16, BLOCK=32)
        assert f".target sm_{gpu.arch}" in compiled.asm["ptx"]


@needs_triton
@needs_compiler
def test_noise_reaches_triton_kernels() -> None:
    from tools.ptx_executor import sample_kernels
    from tools.ptx_executor.driver import simulated_gpu

    a, b, exact, noisy = torch.rand(256) + 1, torch.rand(256) + 1, torch.zeros(256), torch.zeros(256)
    with simulated_gpu(90):
        sample_kernels.quotient[(1,)](a, b, exact, BLOCK=256)
    with simulated_gpu(90, noise=True, seed=3):
        sample_kernels.quotient[(1,)](a, b, noisy, BLOCK=256)
    assert exact.equal((a.double() / b.double()).float())
    distance = (exact.view(torch.int32) - noisy.view(torch.int32)).abs()
    assert 1 <= distance.max() <= 2
