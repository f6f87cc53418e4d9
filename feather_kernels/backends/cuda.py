"""The CUDA C++ backend: ``feather_kernels._cuda`` (csrc/cuda) on NVIDIA GPUs; see docs/design/cuda.md.

The module is built without torch: it takes addresses of device memory, sizes, dtype codes and a stream. It launches on
the device of the result and on torch's current stream there. It is optional, and importing it touches no driver.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from feather_kernels.backends import compiled_module
from feather_kernels.backends.compiled_module import CODES
from feather_kernels.backends.gpu.chunk_tables import ChunkTable, element_count, group_elements, make_rows, make_tables
from feather_kernels.backends.gpu.device_guard import device_guard
from feather_kernels.backends.gpu.probe import probe_by_launch
from feather_kernels.backends.layouts import flatten, write_back

if TYPE_CHECKING:
    from feather_kernels.backends.interface import Histogram, Selection

MODULE = "feather_kernels._cuda"
POWERS = frozenset({1.0, 2.0, 3.0, math.inf})
DRIVER_OF_RUNTIME = {11: 450, 12: 525, 13: 580}  # major version of CUDA -> the oldest release that serves it

_cuda: Any = None  # the module, once load_module has accepted it


# ---------------------------------------------------------------------------------------------- the module


def probe(device: torch.device) -> str | None:
    """Return None if the module is there and a kernel gives the right result on ``device``, else the reason why not."""
    if device.type != "cuda":
        return f"runs CUDA tensors only, not {device.type}"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU, and this torch is built for AMD's"
    reason = load_module()
    if reason is not None:
        return reason
    if not torch.cuda.is_available():
        return "torch finds no CUDA device (no driver, no GPU, or a torch built for CPUs only)"

    return probe_by_launch(threshold, device, lambda error: f"{error}; the module has {'; it '.join(description())}")


def description() -> list[str]:
    """Return lines about the loaded module: the GPUs that it is compiled for, and the driver that it needs."""
    names = _cuda.build_info()["architectures"].split()
    code = ", ".join(name for name in names if not name.startswith("compute_")) or "no GPU"
    ptx = ", ".join(name for name in names if name.startswith("compute_"))
    needs = f"needs an NVIDIA driver for CUDA {runtime_major()}"
    if release := DRIVER_OF_RUNTIME.get(runtime_major()):
        needs += f", R{release} or newer"
    return [f"machine code for {code}" + (f", and PTX of {ptx} for newer GPUs" if ptx else ""), needs]


def runtime_major() -> int:
    """Return the major version of the CUDA runtime that the loaded module is linked with."""
    compiler: str = _cuda.build_info()["compiler"]
    return int(compiler.removeprefix("nvcc ").partition(".")[0])


def load_module() -> str | None:
    """Import the module. Return None if it is there and built from these sources, else the reason why not."""
    global _cuda
    try:
        _cuda = _cuda or compiled_module.load(MODULE, "cuda")
    except ImportError as error:
        return str(error)
    built = "was not built (no CUDA toolkit at install time, or FEATHER_BUILD=cpu)"
    return None if _cuda else f"is not installed: {MODULE} {built}"


def _stream(device: torch.device) -> int:
    """The handle of torch's current stream; 0 on the CPU, where tests execute the launches."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def _address(tensor: Tensor | None) -> int:
    """The address of a tensor, 0 for None. All memory that a kernel is given passes here, but for tables' tensors."""
    return 0 if tensor is None else tensor.data_ptr()


# ---------------------------------------------------------------------------------------------- elementwise ops


@device_guard
def threshold(w: Tensor, t: Tensor, p: float, out: Tensor) -> None:
    """Fill ``out`` with P(w)."""
    flat_out, flat_w = flatten(out, w)
    flat_w, result = cast_to_kernel_dtypes(_cuda.THRESHOLD_DTYPES, t.dtype, flat_w, flat_out)
    _cuda.threshold(
        _address(flat_w), CODES[flat_w.dtype], _address(result), CODES[result.dtype], w.numel(), _address(t), p,
        _stream(out.device),
    )  # fmt: skip
    write_back(flat_out.copy_(result), out)  # a copy of a tensor to itself does nothing


@device_guard
def scale_pruned_grad(g: Tensor, w: Tensor, t: Tensor, grad_scale: Tensor, out: Tensor) -> None:
    """Fill ``out`` with the scaled gradient."""
    product = torch.promote_types(g.dtype, t.dtype)
    flat_out, flat_g, flat_w = flatten(out, g, w)
    flat_g, flat_w, result = cast_to_kernel_dtypes(_cuda.SCALE_DTYPES, product, flat_g, flat_w, flat_out)
    t, grad_scale = t.to(product), grad_scale.to(product)  # wider only where w is now
    _cuda.scale_pruned_grad(
        _address(flat_g), CODES[flat_g.dtype], _address(flat_w), CODES[flat_w.dtype], _address(result),
        CODES[result.dtype], w.numel(), _address(t), _address(grad_scale), _stream(out.device),
    )  # fmt: skip
    write_back(flat_out.copy_(result), out)  # a copy of a tensor to itself does nothing


def cast_to_kernel_dtypes(
    kernels: frozenset[tuple[int, ...]], arithmetic: torch.dtype, *operands: Tensor
) -> list[Tensor]:
    """Return the operands of an op in dtypes for which there is a kernel.

    If there is none for the dtypes of the operands, the weight is cast to the dtype of the arithmetic, which is exact.
    If there is no such kernel either, every operand is: then the kernel does not round what it writes, and the copy
    into the result rounds once, as a kernel would.

    Args:
        kernels: the dtype codes of the operands of each kernel.
        arithmetic: the dtype in which the op computes.
        operands: the last two are a weight and the result.
    """
    *gradient, _, last = own = tuple(CODES[operand.dtype] for operand in operands)
    if own in kernels:
        return list(operands)
    *inputs, result = operands
    if (*gradient, CODES[arithmetic], last) in kernels:
        return [*inputs[:-1], inputs[-1].to(arithmetic), result]
    result = result if result.dtype == arithmetic else torch.empty_like(result, dtype=arithmetic)
    return [*(operand.to(arithmetic) for operand in inputs), result]


# ---------------------------------------------------------------------------------------------- selection, counts


@device_guard
def magnitude_select(selection: Selection, out: Tensor) -> None:
    """Fill ``out`` (G, 2) with the two order statistics of each group; hints are used in float32 without caps."""
    weights, groups, rank, scales, caps, hint = selection
    wide, group_count = out.dtype == torch.float64, rank.numel()
    rows = make_rows(tuple(groups), group_count, caps is not None, rank.device)
    tables = make_tables(weights, rows.of_tensor, _cuda.CHUNK)
    elements = None if hint is None or caps is not None else group_elements(weights, groups, rank)
    shape = wide, group_count, rows.groups.numel(), element_count(weights)
    scratch = rank.new_zeros(_cuda.scratch_size(*shape, _address(caps), _address(hint)))
    _cuda.magnitude_select(
        _addresses(tables), *shape, _address(rank), _address(rows.starts),
        _address(rows.groups), _address(rows.tensors), _address(elements), _address(scales), _address(caps),
        _address(hint), _address(scratch), _address(out), _stream(out.device),
    )  # fmt: skip


@device_guard
def magnitude_histogram(histogram: Histogram, out: Tensor) -> None:
    """Fill ``out`` (G, 2^bits) with the counts of one radix pass."""
    weights, groups, prefix, shift, bits, scales = histogram
    out.zero_()
    tables = make_tables(weights, groups, _cuda.CHUNK)
    _cuda.magnitude_histogram(
        _addresses(tables), _address(scales), _address(prefix), shift, bits, _address(out), _stream(out.device)
    )


@device_guard
def count_pruned(weights: Sequence[Tensor], thresholds: Sequence[Tensor], out: Tensor) -> None:
    """Fill ``out`` (L,) with the number of pruned elements of each weight."""
    out.zero_()
    values = torch.stack(list(thresholds))  # float64 where dtypes are mixed
    tables = make_tables(weights, range(len(weights)), _cuda.CHUNK)
    _cuda.count_pruned(
        _addresses(tables), _address(values), values.dtype == torch.float64, _address(out), _stream(out.device)
    )


def _addresses(tables: Sequence[ChunkTable]) -> list[tuple[int, int, int]]:
    return [(_address(table.chunks), len(table.chunks), CODES[table.dtype]) for table in tables]
