"""Mistakes that a person could make in csrc, one textual change each, and the tests that should notice them.

``CPU`` changes go through the ctest programs (csrc/tests; no Python). ``CUDA`` changes are compiled by nvcc and go
through the checks of cases.py on the PTX executor. test_executed_cuda.py and test_sanitized_source.py plant further
bugs, which are not repeated here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

from tests.simulated_gpu.sanitized_source import ROOT, Change

MATH, DTYPE = "include/feather/math.h", "include/feather/dtype.h"
ELEMENTWISE, SELECTION = "cpu/kernels_elementwise.cpp", "cpu/kernels_selection.cpp"
BRACKET, RADIX, REDUCE = "cuda/bracket_select.cuh", "cuda/radix_select.cuh", "cuda/block_reduce.cuh"

PREDICATE = [
    Change(MATH, "return magnitude(w) <= (t > 0 ? t : T(-1))", "return magnitude(w) < (t > 0 ? t : T(-1))"),
    Change(MATH, "return magnitude(w) <= (t > 0 ? t", "return magnitude(w) <= (t >= 0 ? t"),
]
VALUES = [
    Change(MATH, "return threshold.value <= 0 ? w : threshold.value;", "return w;"),
    Change(MATH, "with_sign(a - threshold.value, w)", "a - threshold.value"),
    Change(MATH, "exponent < 1 ? 1", "exponent < 0 ? 0"),
    Change(MATH, "kFarDouble = 524288.0", "kFarDouble = 1024.0"),
    Change(MATH, "y = bits_of(y) < bits_of(a) ? y : a;", ""),
    Change(MATH, "0.48529533f", "0.38529533f"),
    Change(MATH, "return multiply_add(y * d, q, y);", "return multiply_add(y, q, y);"),
    Change(MATH, "2.0 / 9.0 * d", "0.0 * d"),
    Change(MATH, "multiply_add(x, bound, bound * bound)", "multiply_add(x, bound, -bound * bound)"),
    Change(MATH, "P == 2 ? x + bound", "P == 2 ? x - bound"),
    Change(MATH, "kNanKey = 0x7F800001u", "kNanKey = 0x7F800000u"),
]
CPU = [
    *PREDICATE,
    *VALUES,
    Change(MATH, "x > kFarDouble ? a : y", "y"),
    Change(DTYPE, "(bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16", "(bits + 0x8000u) >> 16"),
    Change(DTYPE, "magnitude >= 0x477FF000u ? 0x7C00u", "magnitude >= 0x49000000u ? 0x7C00u"),
    Change(DTYPE, "magnitude < 0x400u ? denormal : normal", "normal"),
    Change(DTYPE, "0xFFFu + ((magnitude >> 13) & 1u)", "0xFFFu"),
    Change(MATH, "t >= 9.5367431640625e-7f", "t > 0"),
    Change(MATH, "t <= 1048576.0f", "true"),
    Change(DTYPE, "value != value ? quiet : rounded", "rounded"),
    Change(ELEMENTWISE, "if (t <= 0) return convert", "if (t < 0) return convert"),
    Change(ELEMENTWISE, "end = n - start < kStride ? n :", "end = n - start < kStride ? n - 1 :"),
    Change(ELEMENTWISE, "total += count;", "total = count;"),
    Change(ELEMENTWISE, "? scaled : gradient", "? gradient : scaled"),
    Change(ELEMENTWISE, "scale_kernel<decltype(gradient), W, Out>", "scale_kernel<Half, W, Out>"),
    Change(SELECTION, "(key >= low ? 1 : 0)", "(key > low ? 1 : 0)"),
    Change(SELECTION, "up_to_high += key <= high", "up_to_high += key < high"),
    Change(SELECTION, "below += key < low ? 1 : 0;", "below += key <= low ? 1 : 0;"),
    Change(SELECTION, "kScaled ? a * scale : a", "a"),
    Change("cpu/select.cpp", "below += std::min(row_below, row.cap);", "below += row_below;"),
    Change("cpu/select.cpp", "(kept, inside, row.cap - row_below)", "(kept, inside, row.cap)"),
    Change("cpu/select.cpp", "rank_ + (has_next ? 1 : 0) >= below + kept", "rank_ >= below + kept"),
    Change("cpu/select.cpp", "if (rank_ < below || ", "if ("),
    Change("cpu/select.cpp", "std::min_element(first + 1, end)", "std::min_element(first, end)"),
    Change("cpu/radix_select.cpp", "up_to[bin] += std::min(sum, row.cap);", "up_to[bin] += sum;"),
    Change("cpu/radix_select.cpp", "if (mine.at_most < row.cap) next", "next"),
    Change("cpu/radix_select.cpp", "rank + 1 < at_most", "rank + 1 <= at_most"),
    Change("cpu/radix_select.cpp", "keys[i] > key && keys[i]", "keys[i] >= key && keys[i]"),
    Change("cpu/selection_groups.cpp", "row.n += w.n;", "row.n = w.n;"),
    Change("cpu/parallel.h", "blocks / parts * (index + 1) + (blocks % parts) * (index + 1) / parts",
           "blocks / parts * (index + 1) + (blocks % parts) * index / parts"),
]  # fmt: skip
CUDA = [
    *PREDICATE,
    *VALUES,
    Change("cuda/elementwise.cuh", "for_each(thread, head + n - tail", "for_each(thread, n - tail"),
    Change("cuda/elementwise.cuh", "tail, threads * N, pack", "tail, threads, pack"),
    Change("cuda/elementwise.cuh", "i < head ? i : i - head + tail", "i <= head ? i : i - head + tail"),
    Change("cuda/elementwise.cuh", "is_pruned(load<T>(weight), bound) ? value * scale : value;\n  };",
           "is_pruned(load<T>(weight), bound) ? value : value * scale;\n  };"),
    Change("cuda/chunk_table.cuh", "magnitude_key(scale * w)", "magnitude_key(w)"),
    Change("cuda/chunk_table.cuh", "scales[chunk.array]", "scales[chunk.row]"),
    Change("cuda/count.cu", "thresholds[chunk.array]", "thresholds[chunk.row]"),
    Change(REDUCE, "lane >= distance", "lane > distance"),
    Change(REDUCE, "int distance = 16; distance > 0", "int distance = 16; distance > 1"),
    Change(REDUCE, "i < warp ? warp_sums[i]", "i <= warp ? warp_sums[i]"),
    Change(REDUCE, "__syncthreads();\n  int64_t before", "int64_t before"),
    Change(RADIX, "through < cap ? through : cap", "through"),
    Change(RADIX, "before + equal < cap_of(scan, row)", "before + equal <= cap_of(scan, row)"),
    Change(RADIX, "wanted + 1 < at_most", "wanted + 1 <= at_most"),
    Change(RADIX, "key > bound ? minimum", "key >= bound ? minimum"),
    Change(RADIX, "before += total[i] <= bound;", "before += total[i] < bound;"),
    Change(RADIX, "    counts[i] = 0;\n", ""),
    Change(BRACKET, "wanted + 1 < at_most", "wanted + 1 <= at_most"),
    Change(BRACKET, "static_cast<unsigned>(bins) && place != center", "static_cast<unsigned>(bins)"),
    Change(BRACKET, "static_cast<unsigned>(place) < static", "static_cast<unsigned>(place) <= static"),
    Change(BRACKET, "if (start < 0 || wanted < below) return;", "if (start < 0) return;"),
    Change(BRACKET, "smaller += place < 0;", "smaller += place <= 0;"),
    Change(BRACKET, "(next == kBracketRow)", "(false)"),
    Change("cuda/selection.cu", "scan, bits == begin", "scan, true"),
    Change("cuda/selection.cu", "int shift = FloatFormat<T>::kKeyBits;",
           "int shift = FloatFormat<T>::kKeyBits - (sizeof(T) == sizeof(double) ? 1 : 0);"),
]  # fmt: skip


def cpu_outcomes(changes: list[Change]) -> Iterator[tuple[Change, str, str]]:
    """Each change with the program of ctest that fails on it, and how; empty for a survivor."""
    with TemporaryDirectory() as folder:
        copy = Path(folder)
        shutil.copytree(ROOT / "csrc", copy / "csrc")
        shutil.copy(ROOT / "CMakeLists.txt", copy)
        (copy / "feather_kernels").mkdir()
        shutil.copy(ROOT / "feather_kernels" / "_version.py", copy / "feather_kernels")
        _tool("cmake", "-S", copy, "-B", copy / "build", "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release")
        assert _failed_test(copy / "build") == "", "the unchanged sources fail"
        for change in changes:
            unchanged = (copy / "csrc" / change.path).read_text()
            change.apply(copy / "csrc")
            failed = _failed_test(copy / "build")
            (copy / "csrc" / change.path).write_text(unchanged)
            yield change, failed, "ctest" if failed else ""


def _failed_test(build: Path) -> str:
    """Build and run ctest; the name of the first test that fails."""
    _tool("cmake", "--build", build)
    command = ["ctest", "--test-dir", str(build), "--stop-on-failure", "--timeout", "120"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    words = [line.split(" - ")[1] for line in done.stdout.splitlines() if " - " in line and done.returncode]
    assert done.returncode == 0 or words, done.stdout + done.stderr
    return words[0] if words else ""


def _tool(*command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_environment())
    assert done.returncode == 0, f"{' '.join(map(str, command))}:\n{(done.stdout + done.stderr)[-3000:]}"


def _environment() -> dict[str, str]:
    """cmake, ctest and ninja of the environment that runs this, else of the system."""
    return {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
