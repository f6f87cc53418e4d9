"""Ring 2: every Triton kernel compiled ahead of time for NVIDIA architectures, without a GPU.

Gates: no spills, no local memory, at most 64 registers, 128-bit accesses in the elementwise kernels.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from feather_kernels.backends.triton import elementwise, select  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
ARCHITECTURES = (80, 90, 100, 120)
OLD_HISTOGRAM = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 7)
POINTERS = {"fp32": "*fp32", "bf16": "*bf16", "fp16": "*fp16", "fp64": "*fp64"}


def kernels() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], bool]]:
    """Name, kernel, signature, constants, and whether it must move 128 bits at a time."""
    size = {"BLOCK": elementwise.BLOCK}
    for dtype in ("fp32", "bf16"):
        w = POINTERS[dtype]
        for power in (0, 1, 2, 3):
            signature = {"w_ptr": w, "t_ptr": "*fp32", "out_ptr": w, "n": "i64"}
            constants = {"P": power, "WIDE": False, **size}
            yield f"threshold {dtype} p={power or 'inf'}", elementwise.threshold_kernel, signature, constants, True
        signature = {"g_ptr": w, "w_ptr": w, "t_ptr": "*fp32", "scale_ptr": "*fp32", "out_ptr": w, "n": "i64"}
        yield f"scale {dtype}", elementwise.scale_kernel, signature, {"ARITHMETIC": tl.float32, **size}, True
    signature = {"w_ptr": "*fp32", "t_ptr": "*fp32", "out_ptr": "*bf16", "n": "i64"}
    constants = {"P": 3, "WIDE": False, **size}
    yield "threshold fp32 to bf16", elementwise.threshold_kernel, signature, constants, True
    signature = {"w_ptr": "*fp64", "t_ptr": "*fp64", "out_ptr": "*fp64", "n": "i64"}
    yield (
        "threshold fp64",
        elementwise.threshold_kernel,
        signature,
        {"P": 3, "WIDE": True, "BLOCK": elementwise.WIDE_BLOCK},
        False,
    )
    signature = {"w_ptr": "*fp32", "t_ptr": "*fp32", "out_ptr": "*fp32", "n": "i64", "p_ptr": "*fp64"}
    yield "general power", elementwise.general_power_kernel, signature, {"BLOCK": elementwise.GENERAL_BLOCK}, False
    table = {"tensors": "*i64", "chunks": "*i64"}
    size = {"DTYPE": tl.float32, "BLOCK": select.BLOCK, "LOOP": select.LOOP}
    signature = {**table, "scales": "*fp32", "prefixes": "*i64", "counts": "*i64"}
    constants = {"SHIFT": 20, "BITS": 11, "SCALED": True, **size}
    yield "histogram", select.histogram_kernel, signature, constants, False
    signature = {**table, "scales": "*fp32", "bounds": "*i64", "smallest": "*i64"}
    constants = {"SCALED": True, "NAN_KEY": 0x7F800001, **size}
    yield "smallest above", select.smallest_above_kernel, signature, constants, False
    yield "count", select.count_kernel, {**table, "thresholds": "*fp32", "counts": "*i64"}, size, False


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("case", list(kernels()), ids=lambda case: case[0])
def test_resources_and_access_width(case: Any, architecture: int, tmp_path: Path) -> None:
    name, kernel, signature, constants, wide = case
    # what the JIT finds out of pointers that 16 divides, and of n
    attributes = {(i,): [["tt.divisibility", 16]] for i in range(len(signature))}
    signature = {**signature, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = output_of("cuobjdump", "-res-usage", cubin)
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    if name == "histogram" and OLD_HISTOGRAM and found["REG"] > 64:
        pytest.xfail(f"{found['REG']} registers: tl.histogram keeps its bins in registers before triton 3.7")
    assert found["REG"] <= 64, name
    assert found["STACK"] == found["LOCAL"] == 0, "spills or local memory"
    sass = output_of("nvdisasm", "-c", cubin)
    assert not re.search(r"\b(LDL|STL)\b", sass)
    if wide:
        for access in ("LDG", "STG"):
            widths = re.findall(rf"\b{access}\.E[.\w]*", sass)
            assert any(width.endswith(".128") for width in widths), widths


def output_of(tool: str, option: str, cubin: Path) -> str:
    return subprocess.run([TOOLS / tool, option, cubin], capture_output=True, text=True, check=True).stdout
