"""Computes what each Triton kernel costs on three GPUs, and writes docs/gpu-costs.md.

    python -m tools.gpu_costs [--output FILE]

Nothing here is a measured time. tools/ptx_executor runs the PTX of the kernels on CPU tensors and counts the bytes of
global memory and the instructions of all threads. Registers and shared memory are those of the compiled cubin.
Occupancy follows from these, and for each device two lower bounds on the time: bytes / bandwidth and
instructions / rate. The page says how to read them (``PAGE``).
"""

from __future__ import annotations

import argparse
import json
import math
import re
import subprocess
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import triton

import feather_kernels as fk
from feather_kernels.backends.triton import bracket
from tests import conftest

ops = torch.ops.feather_kernels

ELEMENTS = 1 << 17
WEIGHTS = 25_502_912  # prunable weights of ResNet-50
DOCUMENT = Path(__file__).parents[1] / "docs" / "gpu-costs.md"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class Device(NamedTuple):
    """A GPU: memory bandwidth of its data sheet, and what an SM does in a clock cycle."""

    name: str
    architecture: int
    bytes_per_second: float
    multiprocessors: int
    hertz: float  # assumed under load, below the boost clock
    float32_lanes: int
    float64_lanes: int
    shared_bytes: int  # of an SM

    @property
    def cycles_per_second(self) -> float:
        """Of all multiprocessors together."""
        return self.multiprocessors * self.hertz


DEVICES = (
    Device("A100 80GB", 80, 2.0e12, 108, 1.41e9, 64, 32, 164 << 10),
    Device("H100 SXM", 90, 3.35e12, 132, 1.71e9, 128, 64, 228 << 10),
    Device("B200", 100, 8.0e12, 148, 1.85e9, 128, 64, 228 << 10),
)
COUNTED_ON = DEVICES[1]  # whose bytes and instructions the table shows
ISSUE_LANES, WARP, MAX_WARPS, MAX_PROGRAMS, REGISTERS = 128, 32, 64, 32, 65536  # of an SM; 4 warps issue in a cycle


class Case(NamedTuple):
    """A row: those launches of one call whose kernels have these names."""

    name: str
    kernels: tuple[str, ...]
    run: Callable[[], object]
    counts: int = 0  # of 8 bytes, which a call writes once (zeros) and reads once beside what these kernels move


class Cost(NamedTuple):
    """Of one row on one architecture, bytes and instructions per element."""

    read: float
    written: float
    instructions: float  # of SASS if ``sass``, else of PTX
    sass: bool
    float32: float  # of these in PTX, multiply and add
    float64: float
    registers: int
    threads: int
    shared: int


def cases() -> list[Case]:
    """Every kernel whose work grows with the weights, as training launches it."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(ELEMENTS, generator=generator) * 0.05
    t, scale = torch.tensor(0.08), torch.tensor(0.5)
    low, wide = w.bfloat16(), w.double()
    rank = torch.tensor([int(0.9 * ELEMENTS)])
    hint = torch.full((1, 2), float(w.abs().sort().values[rank]))

    def threshold(weight: torch.Tensor, power: float, out_dtype: torch.dtype | None = None) -> Callable[[], object]:
        wide_or_not = t.double() if weight.dtype == torch.float64 else t
        return lambda: ops.threshold(weight, wide_or_not, power, out_dtype=out_dtype)

    keys = bracket.bracket_keys(torch.float32, 1, WEIGHTS)

    def steady() -> object:
        with mock.patch.object(bracket, "NARROWEST", keys):
            return ops.magnitude_select([w], [0], rank, hint=hint)

    elementwise, radix = ("threshold_kernel",), ("histogram_kernel", "smallest_above_kernel")
    rows = [
        Case("threshold p=3, fp32", elementwise, threshold(w, 3.0)),
        Case("threshold p=3, fp32 to bf16", elementwise, threshold(w, 3.0, torch.bfloat16)),
        Case("threshold p=3, bf16", elementwise, threshold(low, 3.0)),
        Case("threshold p=2, fp32", elementwise, threshold(w, 2.0)),
        Case("threshold p=1, fp32", elementwise, threshold(w, 1.0)),
        Case("threshold p=inf, fp32", elementwise, threshold(w, math.inf)),
        Case("threshold p=3, fp64", elementwise, threshold(wide, 3.0)),
    ]
    for name, g, weight in (("fp32", w, w), ("bf16 gradient to fp32", low, w), ("bf16", low, low)):
        rows.append(Case(f"scale_pruned_grad, {name}", ("scale_kernel",), _scaling(g, weight, t, scale)))
    return [
        *rows,
        Case("count_pruned, fp32", ("count_kernel",), lambda: ops.count_pruned([w], [t])),
        Case("select, steady: bracket", ("bracket_kernel",), steady, keys),
        Case("select, steady: passes behind", radix, steady),
        Case("select, cold: all passes", radix, lambda: ops.magnitude_select([w], [0], rank)),
    ]


def _scaling(g: torch.Tensor, w: torch.Tensor, t: torch.Tensor, scale: torch.Tensor) -> Callable[[], object]:
    return lambda: ops.scale_pruned_grad(g, w, t, scale)


def measure(case: Case, architecture: int) -> Cost:
    """Compile a case for an architecture and execute it there."""
    with conftest.ptx_executor(architecture, execute=False) as compiler:
        case.run()
    cubins = [kernel.files for kernel in compiler.loaded if kernel.name in case.kernels]
    registers, threads, shared = max(_resources(files) for files in cubins)
    with conftest.ptx_executor(architecture) as executor:
        case.run()
    launches = [report for report in executor.launches if report.kernel in case.kernels]
    executed: Counter[str] = sum((report.instructions for report in launches), Counter())
    steps = whole_block_instructions(_output("nvdisasm", "-c", cubins[0][".cubin"])) if len(cubins) == 1 else None

    def arithmetic(kind: str) -> float:
        return sum(n for name, n in executed.items() if re.fullmatch(rf"(add|sub|mul|fma)\..*{kind}", name)) / ELEMENTS

    counts = 8 * case.counts / WEIGHTS
    return Cost(
        sum(report.bytes_read for report in launches) / ELEMENTS + counts,
        sum(report.bytes_written for report in launches) / ELEMENTS + counts,
        executed.total() / ELEMENTS if steps is None else steps * launches[0].grid[0] * threads / ELEMENTS,
        steps is not None,
        arithmetic("f32"),
        arithmetic("f64"),
        registers,
        threads,
        shared,
    )


def whole_block_instructions(sass: str) -> int | None:
    """Instructions on the shortest way from entry to exit that has an unmasked 128-bit store; None if none has."""
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s+/\*[0-9a-f]+\*/\s+(.*);", line):
            code.append(instruction[1].strip())

    def walk(at: int, seen: frozenset[int], stored: bool) -> list[int]:
        count = 0
        while at < len(code):
            text, count = code[at], count + 1
            stored |= text.startswith("STG.E.128")
            if text == "EXIT":
                return [count] if stored else []
            if branch := re.search(r"\bBRA.*(\.L\w+)", text):
                if at in seen:
                    return []
                targets = [labels[branch[1]], *([at + 1] if text.startswith("@") else [])]
                return [count + n for target in targets for n in walk(target, seen | {at}, stored)]
            at += 1
        return []

    return min(walk(0, frozenset(), False), default=None)


def _resources(files: dict[str, Path]) -> tuple[int, int, int]:
    """Registers of a thread, threads and bytes of shared memory of a program."""
    usage = re.search(r"REG:(\d+)", _output("cuobjdump", "-res-usage", files[".cubin"]))
    assert usage
    metadata = json.loads(files[".json"].read_text())
    return int(usage[1]), metadata["num_warps"] * WARP, metadata["shared"]


def _output(tool: str, option: str, cubin: Path) -> str:
    return subprocess.run([TOOLS / tool, option, cubin], capture_output=True, text=True, check=True).stdout


def occupancy(cost: Cost, device: Device) -> float:
    """Fraction of an SM's warps that registers, threads and shared memory let run at once."""
    warps = cost.threads // WARP
    warp_registers = math.ceil(cost.registers * WARP / 256) * 256  # allocated in units of 256
    by_registers = REGISTERS // warp_registers // warps
    by_shared = device.shared_bytes // (cost.shared + 1024)  # the system takes 1 KB of each program's
    return min(MAX_WARPS // warps, MAX_PROGRAMS, by_registers, by_shared) * warps / MAX_WARPS


def microseconds(cost: Cost, device: Device) -> tuple[float, float]:
    """Least time for WEIGHTS elements by bytes and by instructions."""
    cycles = max(
        cost.instructions / ISSUE_LANES,
        cost.float32 / device.float32_lanes,
        cost.float64 / device.float64_lanes,
    )
    moved = cost.read + cost.written
    return WEIGHTS * moved / device.bytes_per_second * 1e6, WEIGHTS * cycles / device.cycles_per_second * 1e6


PAGE = """# Computed cost of each Triton kernel

These figures are computed, not measured: no kernel has run on a GPU yet. `python -m tools.gpu_costs` wrote this page
with triton {triton}.

- **Bytes** of global memory per weight are counted by the PTX executor on sm_{architecture}. A plain copy of the
  float32 weights moves the bytes of the first row.
- **Instructions** per weight are SASS instructions along the path of a whole block if the kernel has no loop. Otherwise
  they are executed PTX instructions, of which ptxas makes somewhat fewer.
- **Registers and occupancy** are given for {architectures}. Occupancy is what registers, threads and shared
  memory of an SM allow.
- **The last columns** are two lower bounds on the time for ResNet-50's {weights:.1f} M weights: *by bytes, by
  instructions*. The larger one counts.

Bandwidths come from NVIDIA's data sheets: {bandwidths}.
Instructions issue at 4 warps per cycle on {multiprocessors} SMs at an assumed {clocks} GHz;
multiplications and additions are limited by the width of the float32 and float64 units.

The bracket has the width that ResNet-50 gives it, {keys:,} keys. Its row includes the 8 bytes per key that are zeroed
and summed.

{table}

Where the second bound is larger, the kernel cannot reach the speed of a copy:

{slower}

A selection is {launches} launches. Those missing from the table (scans, sums, the end of the bracket) run one program
per group or per 512 keys and cost little beyond their launch. "Steady" is a call whose hint was right, so the passes
behind the bracket find everything done.
"""


def table(rows: dict[str, list[Cost]]) -> str:
    """A line for each case, from its costs on each of DEVICES."""
    devices = " | ".join(f"µs on {device.name}" for device in DEVICES)
    lines = [
        f"| kernel | bytes read + written | instructions | registers | occupancy | {devices} |",
        "|---|---|---|---|---|" + "---|" * len(DEVICES),
    ]
    for name, costs in rows.items():
        of_devices = list(zip(costs, DEVICES, strict=True))
        counted = costs[DEVICES.index(COUNTED_ON)]
        cells = [
            name,
            f"{counted.read:.2f} + {counted.written:.2f}",
            f"{counted.instructions:.1f} {'SASS' if counted.sass else 'PTX'}",
            "/".join(str(cost.registers) for cost in costs),
            "/".join(f"{occupancy(cost, device):.0%}" for cost, device in of_devices),
            *("{:.0f}, {:.0f}".format(*microseconds(cost, device)) for cost, device in of_devices),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def slower_than_a_copy(rows: dict[str, list[Cost]]) -> str:
    """For each device, the cases that read the weights and take longer by instructions than by bytes."""
    lines = []
    for place, device in enumerate(DEVICES):
        times = {name: microseconds(costs[place], device) for name, costs in rows.items() if costs[place].read > 1}
        names = [name for name, (by_bytes, by_instructions) in times.items() if by_instructions > by_bytes]
        lines.append(f"- {device.name}: {'; '.join(names) or 'none'}")
    return "\n".join(lines)


def page(rows: dict[str, list[Cost]], launches: int) -> str:
    """The text of docs/gpu-costs.md; ``launches``: of a selection."""
    return PAGE.format(
        triton=triton.__version__,
        architecture=COUNTED_ON.architecture,
        architectures="/".join(f"sm_{device.architecture}" for device in DEVICES),
        weights=WEIGHTS / 1e6,
        bandwidths=", ".join(f"{device.name} {device.bytes_per_second / 1e12:.3g} TB/s" for device in DEVICES),
        multiprocessors="/".join(str(device.multiprocessors) for device in DEVICES),
        clocks="/".join(f"{device.hertz / 1e9:.2f}" for device in DEVICES),
        keys=bracket.bracket_keys(torch.float32, 1, WEIGHTS),
        table=table(rows),
        slower=slower_than_a_copy(rows),
        launches=launches,
    )


def launches_of(case: Case) -> int:
    """How many kernels one call launches, those without a row included."""
    with conftest.ptx_executor(COUNTED_ON.architecture) as executor:
        case.run()
    return len(executor.launches)


def main() -> None:
    """Measure every case for every device and write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--output", type=Path, default=DOCUMENT, help="default: %(default)s")
    output = parser.parse_args().output
    with fk.use_backend("triton"):
        listed = cases()
        rows = {case.name: [measure(case, device.architecture) for device in DEVICES] for case in listed}
        launches = launches_of(next(case for case in listed if case.counts))  # the steady selection
    output.write_text(page(rows, launches), encoding="utf-8")


if __name__ == "__main__":
    main()
