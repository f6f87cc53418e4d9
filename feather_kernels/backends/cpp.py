"""The C++ backend: ``feather_kernels._cpu`` (csrc/cpu) on CPU tensors; see docs/design/cpu.md.

The module is built without torch: it takes addresses of dense memory, sizes, dtype codes and a number of threads. It is
optional, and ``probe`` rejects a module that was built from other sources than those beside the package.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, get_num_threads

from feather_kernels.backends import compiled_module, layouts
from feather_kernels.backends.compiled_module import CODES

if TYPE_CHECKING:
    from feather_kernels.backends.interface import Histogram, KeyRanges, Selection

MODULE = "feather_kernels._cpu"
POWERS = frozenset({1.0, 2.0, 3.0, math.inf})

_cpu: Any = None  # the module, once probe has accepted it


# ---------------------------------------------------------------------------------------------- the module


def probe(device: torch.device) -> str | None:
    """Return None if the module is there and built from these sources, else the reason why not."""
    global _cpu
    if device.type != "cpu":
        return f"runs CPU tensors only, not {device.type}"
    try:
        _cpu = _cpu or compiled_module.load(MODULE, "cpu")
    except ImportError as error:
        warnings.warn(f"feather_kernels: the C++ backend is not used: {error}", RuntimeWarning, stacklevel=2)
        return str(error)
    return None if _cpu else "its module was not built (no compiler at install time, or FEATHER_BUILD=none)"


def description() -> list[str]:
    """Return lines about the module: instruction set, build, file. ``probe`` must have accepted it."""
    info = _cpu.build_info()
    others = ", ".join(name for name in _cpu.available_instruction_sets() if name != _cpu.instruction_set())
    return [
        f"instruction set {_cpu.instruction_set()}" + (f" (also here: {others})" if others else ""),
        f"built by {info['compiler']}, threads by {info['threads']}, sources {info['source_hash'][:12]}",
        f"{_cpu.__file__}",
    ]


# ---------------------------------------------------------------------------------------------- elementwise ops


def threshold(w: Tensor, t: Tensor, p: float, out: Tensor) -> None:
    """Fill ``out`` with P(w)."""
    flat, w = layouts.flatten(out, w)
    _cpu.threshold(
        w.data_ptr(), CODES[w.dtype], flat.data_ptr(), CODES[flat.dtype], w.numel(), t.data_ptr(), p, get_num_threads()
    )
    layouts.write_back(flat, out)


def scale_pruned_grad(g: Tensor, w: Tensor, t: Tensor, grad_scale: Tensor, out: Tensor) -> None:
    """Fill ``out`` with the scaled gradient."""
    flat, g, w = layouts.flatten(out, g, w)
    _cpu.scale_pruned_grad(
        g.data_ptr(), CODES[g.dtype], w.data_ptr(), CODES[w.dtype], flat.data_ptr(), CODES[flat.dtype], w.numel(),
        t.data_ptr(), grad_scale.data_ptr(), get_num_threads(),
    )  # fmt: skip
    layouts.write_back(flat, out)


# ---------------------------------------------------------------------------------------------- selection, counts


def magnitude_select(selection: Selection, out: Tensor) -> None:
    """Fill ``out`` (G, 2) with the two order statistics of each group."""
    weights, groups, rank, *vectors = selection
    dense = [layouts.dense(w) for w in weights]
    addresses = [0 if x is None else x.data_ptr() for x in vectors]
    _cpu.magnitude_select(
        _table(dense), list(groups), rank.numel(), rank.data_ptr(), *addresses, out.data_ptr(), get_num_threads()
    )


def magnitude_histogram(histogram: Histogram, out: Tensor) -> None:
    """Fill ``out`` (G, 2^bits) with the counts of one radix pass."""
    weights, groups, prefix, shift, bits, scales = histogram
    dense = [layouts.dense(w) for w in weights]
    _cpu.magnitude_histogram(
        _table(dense), list(groups), prefix.numel(), prefix.data_ptr(), shift, bits,
        0 if scales is None else scales.data_ptr(), out.data_ptr(), get_num_threads(),
    )  # fmt: skip


def collect_keys(ranges: KeyRanges, capacity: int) -> tuple[Tensor, Tensor, Tensor]:
    """Count and collect the keys inside ranges; see ``CpuBackend``."""
    weights, groups, low, high, scales = ranges
    dense = [layouts.dense(w) for w in weights]
    below, inside, keys = torch.empty_like(low), torch.empty_like(low), low.new_empty(capacity)
    _cpu.collect_keys(
        _table(dense), list(groups), low.numel(), low.data_ptr(), high.data_ptr(),
        0 if scales is None else scales.data_ptr(), below.data_ptr(), inside.data_ptr(), keys.data_ptr(), capacity,
        get_num_threads(),
    )  # fmt: skip
    return below, inside, keys[: int(inside.clamp_min(0).sum())]


def count_pruned(weights: Sequence[Tensor], thresholds: Sequence[Tensor], out: Tensor) -> None:
    """Fill ``out`` (L,) with the number of pruned elements of each weight."""
    dense = [layouts.dense(w) for w in weights]
    _cpu.count_pruned(_table(dense), [t.data_ptr() for t in thresholds], out.data_ptr(), get_num_threads())


def _table(weights: Sequence[Tensor]) -> list[tuple[int, int, int]]:
    return [(w.data_ptr(), w.numel(), CODES[w.dtype]) for w in weights]
