"""Run a few lines of PTX on arrays: one thread per element, registers ``%a %b %c ...`` in, ``%out`` out."""

from __future__ import annotations

import numpy as np

from tools.ptx_executor.execution import LaunchReport, Options, Program
from tools.ptx_executor.scalar_types import UNSIGNED, Array

THREADS = 128

KERNEL = """
.version 8.7
.target sm_90
.address_size 64
{declarations}
.visible .entry snippet({parameters})
{{
    .reg .pred %p<8>;
    .reg .b16 %h<16>;
    .reg .b32 %r<32>;
    .reg .b64 %rd<32>;
{body}
    ret;
}}
"""


def run_kernel(
    body: str,
    *arrays: Array,
    threads: int = 32,
    grid: int = 1,
    declarations: str = "",
    options: Options = Options(),  # noqa: B008 - frozen
) -> LaunchReport:
    """Run ``body`` with the arrays' addresses in ``%rd0``, ``%rd1``, ...; the arrays are changed in place."""
    parameters = ", ".join(f".param .u64 arg_{i}" for i in range(len(arrays)))
    loads = "\n".join(f"    ld.param.u64 %rd{i}, [arg_{i}];" for i in range(len(arrays)))
    text = KERNEL.format(parameters=parameters, declarations=declarations, body=f"{loads}\n{body}")
    arguments = b"".join(array.ctypes.data.to_bytes(8, "little") for array in arrays)
    extents = [(array.ctypes.data, array.nbytes) for array in arrays]
    return Program(text).launch([grid], [threads], arguments, extents, options=options)


def evaluate(statements: str, out: type, *inputs: Array, options: Options = Options()) -> Array:  # noqa: B008 - frozen
    """``%out`` of type ``out`` for every element of the inputs ``%a``, ``%b``, ``%c``, ``%d``."""
    count = len(inputs[0])
    padded = -(-count // THREADS) * THREADS
    arrays = [np.resize(array, padded) for array in inputs]
    result: Array = np.zeros(padded, out)
    widths = [array.dtype.itemsize * 8 for array in (*arrays, result)]
    names = [f"%{letter}" for letter in "abcdefg"[: len(arrays)]] + ["%out"]
    lines = [f".reg .b{max(16, width)} {name};" for width, name in zip(widths, names, strict=True)]
    lines += ["mov.u32 %r29, %ctaid.x;", f"shl.b32 %r29, %r29, {THREADS.bit_length() - 1};"]
    lines += ["mov.u32 %r30, %tid.x;", "or.b32 %r30, %r30, %r29;"]
    for i, width in enumerate(widths):
        lines += [f"mul.wide.u32 %rd20, %r30, {width // 8};", f"add.s64 %rd{i}, %rd{i}, %rd20;"]
    for i, (width, name) in enumerate(zip(widths[:-1], names[:-1], strict=True)):
        lines.append(f"ld.global.b{width} {name}, [%rd{i}];")
    lines += [statements, f"st.global.b{widths[-1]} [%rd{len(arrays)}], %out;"]
    run_kernel("\n".join(lines), *arrays, result, threads=THREADS, grid=padded // THREADS, options=options)
    return result[:count]


def raw_bits(values: Array) -> Array:
    """The bits of an array, for comparisons that tell zeros and NaNs apart."""
    return values.view(UNSIGNED[values.dtype.itemsize * 8])
