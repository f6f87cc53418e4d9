"""Bugs planted in csrc/cuda, and what the executor and the stand-in for the CUDA runtime report for each.

evidence.py also runs the op tests this way, with FEATHER_PTX_BACKEND=cuda and FEATHER_PTX_ARCHITECTURE=90.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import feather_kernels as fk
from feather_kernels.backends import cuda
from tests.conftest import PTX_ARCHITECTURE, PTX_BACKEND
from tests.simulated_gpu import shipped_build
from tests.simulated_gpu.cuda_module_on_cpu import cuda_on_cpu
from tests.simulated_gpu.executed_cuda import STREAM, Executor, executed
from tests.simulated_gpu.sanitized_source import Change
from tests.support import oracle, samples
from tools.ptx_executor import errors

pytestmark = pytest.mark.skipif(not PTX_ARCHITECTURE or PTX_BACKEND != "cuda", reason="needs the PTX executor")

ops = torch.ops.feather_kernels
T, SCALE = torch.tensor(0.5), torch.tensor(0.25)
TAIL = 1501  # elements: some in a head or a tail, some in whole accesses


def normal(numel: int = TAIL) -> torch.Tensor:
    return torch.randn(numel, generator=torch.Generator().manual_seed(numel))


# -- checks ------------------------------------------------------------------------------------------------------------


def threshold(gpu: Executor, layout: str = "contiguous") -> None:
    w = samples.LAYOUTS[layout](normal())
    out = torch.full_like(w, torch.nan)
    cuda.threshold(w, T, 3.0, out)
    assert oracle.ulp_error(out, oracle.threshold(w, T, 3.0)) <= 2


def threshold_of_misaligned(gpu: Executor) -> None:
    threshold(gpu, "misaligned")


def gradient(gpu: Executor) -> None:
    g, w = normal() + 1, normal()
    out = torch.full_like(g, torch.nan)
    cuda.scale_pruned_grad(g, w, T, SCALE, out)
    assert oracle.ulp_error(out, oracle.scaled_gradient(g, w, T, 0.25)) == 0


def count(gpu: Executor) -> None:
    weights = [normal(), normal(20_000)]
    expected = [int(oracle.pruned(w, T).sum()) for w in weights]
    assert ops.count_pruned(weights, [T, T]).tolist() == expected, "wrong counts"


def count_of_misaligned(gpu: Executor) -> None:
    w = samples.LAYOUTS["misaligned"](normal())
    assert ops.count_pruned([w], [T]).item() == int(oracle.pruned(w, T).sum()), "wrong counts"


def select(gpu: Executor) -> None:
    w = normal()
    found = ops.magnitude_select([w], [0], torch.tensor([TAIL // 2]))
    assert found.equal(w.abs().sort().values[None, TAIL // 2 : TAIL // 2 + 2]), "wrong order statistics"


def steady_select(gpu: Executor) -> None:
    """With passes that exit at once, as what they would find is known: keys as close as the narrowest bracket needs."""
    w = 1 + torch.randint(0, 400, (TAIL,), generator=torch.Generator().manual_seed(0)) * 2.0**-23
    hint = w.abs().sort().values[None, TAIL // 2 : TAIL // 2 + 2]
    found = ops.magnitude_select([w], [0], torch.tensor([TAIL // 2]), hint=hint)
    assert found.equal(hint), "wrong order statistics"
    passes = [report.bytes_read for report in gpu.launches if report.kernel == "histogram_kernel"]
    assert len(passes) == 3
    assert max(passes) < 100, "the bracket was missed"


CHECKS = (threshold, threshold_of_misaligned, gradient, count, count_of_misaligned, select, steady_select)


# -- planted bugs ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bug:
    """After the change ``check`` raises ``error``, a class of ptx or a builtin, with a message like ``message``."""

    name: str
    change: Change
    check: Callable[[Executor], None]
    error: str
    message: str

    def __str__(self) -> str:
        return self.name


BUGS = [
    Bug(
        "threshold and scale swapped in a launch",
        Change(
            "cuda/elementwise.cu",
            "weight, static_cast<const T*>(t), static_cast<const T*>(grad_scale), target",
            "weight, static_cast<const T*>(grad_scale), static_cast<const T*>(t), target",
        ),
        gradient,
        "AssertionError",
        "assert .* == 0",
    ),
    Bug(
        "size and head swapped in a launch",
        Change("cuda/elementwise.cu", "(t), target, n, head", "(t), target, head, n"),
        threshold,
        "OutOfBoundsError",
        "threshold_kernel",
    ),
    Bug(
        "members of a struct swapped in a launch of the bracket",
        Change(
            "cuda/selection.cu",
            "scratch.bracket_below, scratch.bracket_counts, scratch.bracket_sums",
            "scratch.bracket_counts, scratch.bracket_below, scratch.bracket_sums",
        ),
        steady_select,
        "AssertionError",
        "wrong order statistics",
    ),
    Bug(
        "members of a struct swapped in a launch",
        Change("cuda/selection.cu", "scratch.prefixes, scratch.below, s", "scratch.below, scratch.prefixes, s"),
        select,
        "AssertionError",
        "wrong order statistics",
    ),
    Bug(
        "stream of 32 bits in the module's interface",
        Change("cuda/bindings.cpp", "Address counts, Address stream) {\n  feather::cuda::count_pruned",
               "Address counts, int32_t low) {\n  const Address stream(low);\n  feather::cuda::count_pruned"),
        count,
        "TypeError",
        "incompatible function arguments",
    ),
    Bug(
        "stream cut to 32 bits",
        Change("cuda/bindings.cpp", "wide, counts, stream",
               "wide, counts, Address(static_cast<uint32_t>(stream.value))"),
        count,
        "AssertionError",
        f"on stream {STREAM & 0xFFFFFFFF:#x} instead of {STREAM:#x}",
    ),
    Bug(
        "stream forgotten in a launch",
        Change("cuda/selection.cu", "launch(kSelect, s.groups, stream, bracket_end_kernel",
               "launch(kSelect, s.groups, nullptr, bracket_end_kernel"),
        steady_select,
        "AssertionError",
        "bracket_end_kernel.* on stream 0x0 instead of",
    ),
    Bug(
        "no barrier between zeroing and counting",
        Change("cuda/radix_select.cuh", "    __syncthreads();\n    const K upper", "    const K upper"),
        select,
        "DataRaceError",
        "histogram_kernel.*shared",
    ),
    Bug(
        "no barrier between counting and adding up",
        Change("cuda/radix_select.cuh", "    __syncthreads();\n    int64_t* row = counts", "    int64_t* row = counts"),
        select,
        "DataRaceError",
        "histogram_kernel.*shared",
    ),
    Bug(
        "no barrier before the sums of warps are read",
        Change("cuda/block_reduce.cuh", "  __syncthreads();\n  int64_t total", "  int64_t total"),
        select,
        "DataRaceError",
        "scan_kernel.*shared",
    ),
    Bug(
        "wide access to a misaligned address",
        Change("cuda/elementwise.cu", "for (int64_t head = 0;", "if (n > 0) return 0;\n  for (int64_t head = 0;"),
        threshold_of_misaligned,
        "MisalignedError",
        "threshold_kernel.*16-byte global access",
    ),
    Bug(
        "head of a chunk forgotten",
        Change("cuda/chunk_table.cuh", "(kAccess - past) % kAccess / sizeof(W)", "past * 0 / sizeof(W)"),
        count_of_misaligned,
        "MisalignedError",
        "count_kernel.*16-byte global access",
    ),
    Bug(
        "tail one too long",
        Change("cuda/elementwise.cuh", "head + n - tail, threads", "head + n - tail + 1, threads"),
        gradient,
        "OutOfBoundsError",
        "scale_kernel",
    ),
    Bug(
        "tail of a chunk one too long",
        Change("cuda/chunk_table.cuh", "if (tail + thread < chunk.elements)", "if (tail + thread <= chunk.elements)"),
        count,
        "OutOfBoundsError",
        "count_kernel",
    ),
    Bug(
        "tail forgotten",
        Change("cuda/elementwise.cuh", "head + n - tail, threads", "head, threads"),
        threshold,
        "AssertionError",
        "assert .* <= 2|different places",
    ),
    Bug(
        "bin one beyond the shared memory",
        Change("cuda/radix_select.cuh", "found, 1 << kDigitBits);", "found, (1 << kDigitBits) - 1);"),
        select,
        "OutOfBoundsError",
        "histogram_kernel.*shared",
    ),
]  # fmt: skip


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_a_planted_bug_is_found(bug: Bug, tmp_path: Path) -> None:
    module, code = shipped_build.changed(bug.change, PTX_ARCHITECTURE, tmp_path)
    error = {"AssertionError": AssertionError, "TypeError": TypeError}.get(bug.error) or getattr(errors, bug.error)
    with executed(PTX_ARCHITECTURE, module, code) as gpu, fk.use_backend("cuda"), pytest.raises(error) as raised:
        bug.check(gpu)
    assert re.search(bug.message, str(raised.value))


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_check_passes_without_the_bug(check: Callable[[Executor], None]) -> None:
    with executed(PTX_ARCHITECTURE) as gpu, fk.use_backend("cuda"):
        check(gpu)


# -- the stand-in ------------------------------------------------------------------------------------------------------


def test_every_kernel_has_ptx() -> None:
    """Names that the module's objects register, against the entries of the PTX."""
    with executed(PTX_ARCHITECTURE) as gpu:
        names = {name.encode() for name in gpu.entries}
    registered = set(
        re.findall(rb"\0(_ZN7feather4cuda\d+[a-z_]+_kernel\w+)(?=\0)", shipped_build.relinked().read_bytes())
    )
    assert len(names) > 50
    assert names <= registered


def test_a_launch_that_nobody_takes_names_the_op() -> None:
    path = str(shipped_build.relinked())
    with cuda_on_cpu(path), fk.use_backend("cuda"):
        ctypes.CDLL(path).feather_set_launcher(None)
        with pytest.raises(RuntimeError, match=r"^threshold: CUDA error cudaErrorInvalidDeviceFunction: "):
            ops.threshold(normal(), T, 3.0)


def test_memory_that_a_call_was_not_given_is_out_of_bounds() -> None:
    w, other = normal(), normal()
    with executed(PTX_ARCHITECTURE) as gpu, pytest.raises(errors.OutOfBoundsError, match="threshold_kernel"):
        gpu.threshold(cuda._address(w), 2, other.data_ptr(), 2, TAIL, cuda._address(T), 3.0, STREAM)
