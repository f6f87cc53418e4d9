"""The C++ backend: ``feather_kernels._cpu`` (csrc/cpu) on CPU tensors; see docs/design/native.md.

The module knows nothing of torch: it takes addresses of dense memory, sizes, dtype codes and a number of threads. It is
optional. ``probe`` refuses one that is incomplete or was built from other sources than those beside the package.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, get_num_threads

from feather_kernels._version import __version__

MODULE = "feather_kernels._cpu"
SOURCES = (".h", ".cuh", ".cpp", ".cu", ".txt")  # files that a module's hash is made of
CODES = {torch.float16: 0, torch.bfloat16: 1, torch.float32: 2, torch.float64: 3}  # csrc/include/feather/dtype.h
REBUILD = "rebuild it with `pip install -e .` (or `python setup.py build_ext --inplace`)"

_cpu: Any = None  # the module, once probe has found it good


# ---------------------------------------------------------------------------------------------- the module


def probe(device: torch.device) -> str | None:
    """None if the module is there, whole and of these sources, else the reason why not."""
    global _cpu
    if device.type != "cpu":
        return f"runs CPU tensors only, not {device.type}"
    if _cpu is not None:
        return None
    spec = importlib.util.find_spec(MODULE)
    if spec is None or spec.origin is None:
        return "its module was not built (no compiler at install time, or FEATHER_BUILD=none)"
    reason = incomplete(Path(spec.origin))
    if reason is None:
        try:
            module = importlib.import_module(MODULE)
        except ImportError as error:
            reason = f"cannot be loaded: {error}"
        else:
            reason = mismatch(module)
    if reason is None:
        _cpu = module
        return None
    reason = f"{spec.origin} {reason}; {REBUILD}"
    warnings.warn(f"feather_kernels: the C++ backend is not used: {reason}", RuntimeWarning, stacklevel=2)
    return reason


def description() -> list[str]:
    """Facts on the module in use: instruction set, build, origin; probe must have found it good."""
    info = _cpu.build_info()
    others = ", ".join(name for name in _cpu.available_instruction_sets() if name != _cpu.instruction_set())
    return [
        f"instruction set {_cpu.instruction_set()}" + (f" (also here: {others})" if others else ""),
        f"built by {info['compiler']}, threads by {info['threads']}, sources {info['source_hash'][:12]}",
        f"{_cpu.__file__}",
    ]


def incomplete(path: Path) -> str | None:
    """Why a file cannot be loaded safely, or None: loading an ELF file that was cut off can kill the process.

    The section headers stand at the end of the file; their offset is in its first 64 bytes.
    """
    with path.open("rb") as file:
        header = file.read(64)
    if header[:4] != b"\x7fELF" or len(header) < 64 or header[4] != 2:
        return None if path.suffix != ".so" or header[:4] == b"\xcf\xfa\xed\xfe" else "is no 64-bit ELF file"
    order = "<" if header[5] == 1 else ">"
    (table,) = struct.unpack_from(order + "Q", header, 40)
    entry_size, entries = struct.unpack_from(order + "HH", header, 58)
    if path.stat().st_size < table + entry_size * entries:
        return f"is truncated: {path.stat().st_size} bytes of {table + entry_size * entries}"
    return None


def mismatch(module: ModuleType, folder: str = "cpu") -> str | None:
    """Why a loaded module does not belong to this package, or None."""
    try:
        info = module.build_info()
        version, sources = info["version"], info["source_hash"]
    except (AttributeError, KeyError, TypeError):
        return "is not a module of feather_kernels"
    if version != __version__:
        return f"was built for feather_kernels {version}, this is {__version__}"
    expected = source_hash(Path(__file__).parents[2], folder)
    if expected is not None and sources != expected:
        return f"was built from other sources ({sources[:12]}) than those beside the package ({expected[:12]})"
    return None


def source_hash(root: Path, folder: str = "cpu") -> str | None:
    """Hash of the sources of the module in csrc/``folder``, as CMake computes it, or None if there are none."""
    if not (root / "CMakeLists.txt").is_file() or not (root / "csrc" / folder).is_dir():
        return None
    paths = [root / "CMakeLists.txt", *(root / "csrc" / "include").rglob("*.h")]
    paths += [path for path in (root / "csrc" / folder).rglob("*") if path.suffix in SOURCES]
    lines = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    hashes = "".join(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for name, path in lines)
    return hashlib.sha256(hashes.encode()).hexdigest()


# ---------------------------------------------------------------------------------------------- elementwise ops


def threshold(w: Tensor, t: Tensor, p: float, out: Tensor) -> None:
    """Fill ``out`` with P(w)."""
    if w.is_contiguous() and out.is_contiguous():
        _threshold(w, t, p, out)
    else:
        flat_out, flat_w = flatten(out, w)
        _threshold(flat_w, t, p, flat_out)
        write_back(flat_out, out)


def _threshold(w: Tensor, t: Tensor, p: float, out: Tensor) -> None:
    _cpu.threshold(
        w.data_ptr(), CODES[w.dtype], out.data_ptr(), CODES[out.dtype], w.numel(), t.data_ptr(), p, get_num_threads()
    )


def scale_pruned_grad(g: Tensor, w: Tensor, t: Tensor, grad_scale: Tensor, out: Tensor) -> None:
    """Fill ``out`` with the scaled gradient."""
    if g.is_contiguous() and w.is_contiguous() and out.is_contiguous():
        _scale_pruned_grad(g, w, t, grad_scale, out)
    else:
        flat_out, flat_g, flat_w = flatten(out, g, w)
        _scale_pruned_grad(flat_g, flat_w, t, grad_scale, flat_out)
        write_back(flat_out, out)


def _scale_pruned_grad(g: Tensor, w: Tensor, t: Tensor, grad_scale: Tensor, out: Tensor) -> None:
    _cpu.scale_pruned_grad(
        g.data_ptr(), CODES[g.dtype], w.data_ptr(), CODES[w.dtype], out.data_ptr(), CODES[out.dtype], w.numel(),
        t.data_ptr(), grad_scale.data_ptr(), get_num_threads(),
    )  # fmt: skip


def flatten(first: Tensor, *others: Tensor) -> list[Tensor]:
    """Contiguous tensors of matching elements, in the storage order of ``first``.

    Views where a tensor is dense in that order; other layouts are copied once. ``write_back`` completes a ``first``
    that was copied.
    """
    order = storage_order(first)
    return [tensor.detach().permute(order).contiguous() for tensor in (first, *others)]


def write_back(flat: Tensor, out: Tensor) -> None:
    """Copy what was written for ``out`` into it, if flatten had to copy it."""
    if flat.data_ptr() != out.data_ptr():
        out.permute(storage_order(out)).copy_(flat)


def storage_order(tensor: Tensor) -> list[int]:
    """Dimensions by descending stride."""
    strides = tensor.stride()
    return sorted(range(tensor.dim()), key=lambda d: (-strides[d], d))


# ---------------------------------------------------------------------------------------------- selection, counts


def magnitude_select(
    weights: Sequence[Tensor],
    groups: Sequence[int],
    rank: Tensor,
    scales: Tensor | None,
    caps: Tensor | None,
    hint: Tensor | None,
    out: Tensor,
) -> None:
    """Fill ``out`` (G, 2) with the two order statistics of each group."""
    dense = [_dense(w) for w in weights]
    rank, vectors = rank.contiguous(), [None if x is None else x.contiguous() for x in (scales, caps, hint)]
    addresses = [0 if x is None else x.data_ptr() for x in vectors]
    _cpu.magnitude_select(
        *_table(dense), list(groups), rank.numel(), rank.data_ptr(), *addresses, out.data_ptr(), get_num_threads()
    )


def magnitude_histogram(
    weights: Sequence[Tensor],
    groups: Sequence[int],
    prefix: Tensor,
    shift: int,
    bits: int,
    scales: Tensor | None,
    out: Tensor,
) -> None:
    """Fill ``out`` (G, 2^bits) with the counts of one radix pass."""
    dense, prefix = [_dense(w) for w in weights], prefix.contiguous()
    scales = None if scales is None else scales.contiguous()
    address = 0 if scales is None else scales.data_ptr()
    _cpu.magnitude_histogram(
        *_table(dense), list(groups), prefix.numel(), prefix.data_ptr(), shift, bits, address, out.data_ptr(),
        get_num_threads(),
    )  # fmt: skip


def count_pruned(weights: Sequence[Tensor], thresholds: Sequence[Tensor], out: Tensor) -> None:
    """Fill ``out`` (L,) with the number of pruned elements of each weight."""
    dense = [_dense(w) for w in weights]
    _cpu.count_pruned(*_table(dense), [t.data_ptr() for t in thresholds], out.data_ptr(), get_num_threads())


def _table(weights: list[Tensor]) -> tuple[list[int], list[int], list[int]]:
    return [w.data_ptr() for w in weights], [w.numel() for w in weights], [CODES[w.dtype] for w in weights]


def _dense(w: Tensor) -> Tensor:
    """The elements of w in any order, one after the other; a copy only where its memory has gaps or repeats."""
    return w if w.is_contiguous() else w.detach().permute(storage_order(w)).contiguous()
