"""What Triton's JIT compiles for the ops' launches on four NVIDIA architectures; nothing is executed.

The code must have no spills, no local memory, at most 64 registers, no fence, and atomic updates that are relaxed and
return nothing. A kernel that streams weights must have the 128-bit accesses of a whole block, counted. For gfx942 the
same kernels are compiled and their registers recorded, without a gate.
"""

from __future__ import annotations

import math
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402

import feather_kernels as fk  # noqa: E402
from feather_kernels.backends.triton import bracket, elementwise  # noqa: E402
from feather_kernels.backends.triton.launch import COMPILE  # noqa: E402
from tests.conftest import ptx_executor  # noqa: E402
from tests.simulated_gpu.shipped_build import ORDERING  # noqa: E402
from tests.support import oracle, samples  # noqa: E402

ops = torch.ops.feather_kernels
NVIDIA = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100, 120)
THREADS = 128  # of a program: 4 warps, as Triton launches by default
MOST_REGISTERS = 64
# tl.histogram keeps bins in registers before triton 3.7
OLD_HISTOGRAM = 68 if tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7) else MOST_REGISTERS
ALIGNED = 1 << 14  # elements; nothing is executed, so their number matters for its divisibility only
FLOAT32, BFLOAT16, FLOAT64 = torch.float32, torch.bfloat16, torch.float64


def threshold(dtype: torch.dtype, out_dtype: torch.dtype, p: float) -> None:
    w = torch.ones(ALIGNED, dtype=dtype)
    ops.threshold(w, samples.scalar(0.5, dtype, w.device), p, out_dtype=out_dtype)


def scale_pruned_grad(gradient_dtype: torch.dtype, dtype: torch.dtype) -> None:
    w, g = torch.ones(ALIGNED, dtype=dtype), torch.ones(ALIGNED, dtype=gradient_dtype)
    t = samples.scalar(0.5, dtype, w.device)
    ops.scale_pruned_grad(g, w, t, t, out_dtype=dtype)


def count_pruned(dtype: torch.dtype) -> None:
    ops.count_pruned([torch.ones(ALIGNED, dtype=dtype)], [samples.scalar(0.5, dtype, torch.device("cpu"))])


def magnitude_select(dtype: torch.dtype, scaled: bool, capped: bool) -> None:
    """Several groups, with a hint."""
    weights, rank = [torch.ones(ALIGNED, dtype=dtype) for _ in range(3)], torch.tensor([5, 7])
    compute = oracle.compute_dtype(dtype)
    scales = torch.ones(3, dtype=compute) if scaled else None
    caps = torch.full((3,), 100) if capped else None
    ops.magnitude_select(weights, [0, 1, 0], rank, scales=scales, caps=caps, hint=torch.ones(2, 2, dtype=compute))


def magnitude_select_of_many() -> None:
    """With a hint, from as many weights as the widest bracket asks for."""
    elements = bracket.WIDEST * bracket.ELEMENTS_A_KEY
    assert bracket.bracket_keys(FLOAT32, 1, elements) == bracket.WIDEST
    rank, hint = torch.tensor([elements // 2]), torch.ones(1, 2)
    ops.magnitude_select([torch.ones(elements)], [0], rank, hint=hint)


def magnitude_histogram() -> None:
    ops.magnitude_histogram([torch.ones(ALIGNED)], [0], torch.zeros(1, dtype=torch.int64), 20, 11)


CALLS: dict[str, Callable[[], None]] = {
    **{
        f"threshold {str(dtype)[6:]} p={p}": lambda dtype=dtype, p=p: threshold(dtype, dtype, p)
        for dtype in (FLOAT32, BFLOAT16, FLOAT64)
        for p in (1.0, 2.0, 3.0, math.inf)
    },
    "threshold float32 to bfloat16": lambda: threshold(FLOAT32, BFLOAT16, 3.0),
    "scale float32": lambda: scale_pruned_grad(FLOAT32, FLOAT32),
    "scale bfloat16": lambda: scale_pruned_grad(BFLOAT16, BFLOAT16),
    "scale bfloat16 to float32": lambda: scale_pruned_grad(BFLOAT16, FLOAT32),
    "count float32": lambda: count_pruned(FLOAT32),
    "count bfloat16": lambda: count_pruned(BFLOAT16),
    "select float32": lambda: magnitude_select(FLOAT32, scaled=False, capped=False),
    "select float32 scaled, capped": lambda: magnitude_select(FLOAT32, scaled=True, capped=True),
    "select bfloat16": lambda: magnitude_select(BFLOAT16, scaled=False, capped=False),
    "select float64": lambda: magnitude_select(FLOAT64, scaled=False, capped=False),
    "select float32, widest bracket": magnitude_select_of_many,
    "histogram of 11 bits": magnitude_histogram,
}


def compiled(call: Callable[[], None], architecture: int) -> Any:
    """The driver after ``call``: every kernel that the JIT compiled for its launches."""
    with ptx_executor(architecture, execute=False) as driver, fk.use_backend("triton"):
        call()
    assert driver.loaded
    return driver


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("name", CALLS)
def test_resources_and_access_width(name: str, architecture: int) -> None:
    driver = compiled(CALLS[name], architecture)
    for kernel, source in zip(driver.loaded, driver.sources, strict=True):
        cubin = kernel.files[".cubin"]
        usage = output_of("cuobjdump", "-res-usage", cubin)
        found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
        assert found["REG"] <= (OLD_HISTOGRAM if kernel.name == "histogram_kernel" else MOST_REGISTERS), kernel.name
        assert found["STACK"] == found["LOCAL"] == 0, f"{kernel.name}: spills or local memory"
        sass = output_of("nvdisasm", "-c", cubin)
        assert not re.search(r"\b(LDL|STL)\b", sass), kernel.name
        assert not ORDERING.search(kernel.files[".ptx"].read_text()), kernel.name
        assert not re.search(r"\b(MEMBAR|ERRBAR|FENCE|CCTL|ATOMG?)\b", sass), kernel.name
        expected = whole_block_accesses(source)
        found = {access: len(re.findall(rf"\b{access}\.E[.\w]*\.128\b", sass)) for access in expected}
        assert found == expected, kernel.name


def whole_block_accesses(source: Any) -> dict[str, int]:
    """128-bit loads and stores of a thread in a whole block, of a kernel that streams weights.

    A block stands once in the code: the loop over a chunk's blocks is not unrolled, and what is done under a mask is
    narrower.
    """
    names = source.fn.arg_names
    constants = {names[place]: value for (place,), value in source.constants.items()}
    elements = constants.get("BLOCK", 0) // THREADS

    def accesses(*bits: int) -> int:
        return sum(elements * width // 128 for width in bits)

    def bits(argument: str) -> int:
        return int(re.fullmatch(r"\*[a-z]+(\d+)", source.signature[argument])[1])

    if source.fn.__name__ in ("threshold_kernel", "scale_kernel"):
        inputs = [bits(name) for name in ("g_ptr", "w_ptr") if name in names]
        return {"LDG": accesses(*inputs), "STG": accesses(bits("out_ptr"))}
    return {"LDG": accesses(constants["STORED"].primitive_bitwidth)} if "chunks" in names else {}


def test_a_power_without_a_kernel() -> None:
    w, t = torch.ones(3), torch.tensor(0.5)
    with pytest.raises(ValueError, match=r"power must be 1, 2, 3 or inf on the Triton backend, got 4\.5"):
        elementwise.threshold(w, t, 4.5, torch.empty_like(w))


def output_of(tool: str, option: str, cubin: Path) -> str:
    return subprocess.run([NVIDIA / tool, option, cubin], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("name", CALLS)
def test_compiles_for_gfx942(name: str, record_property: Callable[[str, object], None]) -> None:
    if "amd" not in triton.backends.backends:
        pytest.skip("this triton has no AMD compiler")
    registers, spilled = [], []
    for source in compiled(CALLS[name], 90).sources:
        code = triton.compile(source, target=GPUTarget("hip", "gfx942", 64), options=COMPILE).asm["amdgcn"]
        registers += map(int, re.findall(r"\.vgpr_count:\s+(\d+)", code))
        spilled += map(int, re.findall(r"\.vgpr_spill_count:\s+(\d+)", code))
    record_property(f"gfx942 {name}", f"{len(registers)} kernels, up to {max(registers)} VGPRs, {sum(spilled)} spilled")
