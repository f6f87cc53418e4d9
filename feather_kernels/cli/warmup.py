"""``feather-kernels warmup``: compiles ahead what the first training step on a device would compile.

It calls the ops on small tensors in every form that Triton compiles separately: dtypes, powers, addresses that are
multiples of 16 or not, optional arguments, and the order of magnitude of the number of weights. The compiled kernels
stay in Triton's cache on disk. Only single tensors of 2^31 elements or more are left for training to compile.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Sequence
from itertools import product
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from feather_kernels.backends.registry import registry
from feather_kernels.cli import nvidia_driver
from feather_kernels.cli.errors import InputError
from feather_kernels.cli.near_names import unknown_name
from feather_kernels.dtypes import compute_dtype
from feather_kernels.errors import BackendUnavailableError

if TYPE_CHECKING:
    import argparse

ops = torch.ops.feather_kernels

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (torch.float32, torch.bfloat16, torch.float16)}
DTYPES["float64"] = torch.float64
DEFAULT_DTYPES = ("float32", "bfloat16", "float16")
AUTOCAST = {torch.float32: (torch.bfloat16, torch.float16)}  # dtype of a weight -> dtypes that autocast casts it to
POWERS = (1.0, 2.0, 3.0, math.inf)
SIZE = 1 << 17
# selection is compiled once for each power of two in the number of weights, as long as its bracket grows with it
LIST_NUMELS = tuple(1 << k for k in range(14, 22))


def run(options: argparse.Namespace) -> int:
    """Warm up the devices and dtypes that the options name; returns the exit code: 1 if nothing can run.

    Raises:
        InputError: a dtype or a device is unknown.
    """
    dtypes = options.dtype or DEFAULT_DTYPES
    for name in dtypes:
        if name not in DTYPES:
            raise unknown_name("--dtype", name, DTYPES)
    names = options.device or [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if not names:
        print(f"feather-kernels: {nvidia_driver.no_device()}; nothing to compile", file=sys.stderr)
        return 1
    try:
        devices = [torch.device(name) for name in names]
    except RuntimeError as error:
        raise InputError(f"--device must be devices such as cuda:0, got {' '.join(names)}: {error}") from error
    return warm_up(devices, dtypes)


def warm_up(devices: Sequence[torch.device], dtypes: Sequence[str]) -> int:
    """Compile for every device and dtype, and print what was compiled.

    Args:
        devices: to compile for; Triton must be able to run on each.
        dtypes: of the weights; names in ``DTYPES``.

    Returns:
        The exit code: 1, with the reason on stderr, if Triton cannot run.
    """
    begin, total = time.perf_counter(), 0
    try:
        for device, dtype, op in product(devices, dtypes, CALLS):
            total += _warm(device, dtype, op)
    except BackendUnavailableError as error:
        print(f"feather-kernels: nothing to compile: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    print(f"{total} kernels compiled in {time.perf_counter() - begin:.1f} s")
    return 0


def _warm(device: torch.device, dtype: str, op: str) -> int:
    """Compile the Triton kernels of one op, print what was compiled, and return the number of compiled kernels."""
    begin = time.perf_counter()
    with registry.use_backend("triton"), torch.no_grad():
        registry.backend_for(device)  # raises with the backend's own reason before the import below could fail
        from feather_kernels.backends.triton.compilations import Compilations

        with Compilations() as found:
            CALLS[op](DTYPES[dtype], device)
    kernels = f"{len(found.compiled)} kernels compiled, {len(found.cached)} from Triton's cache"
    print(f"{device} {op} {dtype}: {kernels}, {time.perf_counter() - begin:.1f} s", flush=True)
    return len(found.compiled)


def _threshold(dtype: torch.dtype, device: torch.device) -> None:
    w, t = _weight_and_threshold(dtype, device)
    for out_dtype in (dtype, *AUTOCAST.get(dtype, ())):
        for weight, out in product(_aligned_or_not(w), _aligned_or_not(w.to(out_dtype, copy=True))):
            for power in POWERS:
                ops.threshold.out(weight, t, power, out=out)


def _scale_pruned_grad(dtype: torch.dtype, device: torch.device) -> None:
    w, t = _weight_and_threshold(dtype, device)
    for grad_dtype in (dtype, *AUTOCAST.get(dtype, ())):
        for gradient, weight in product(_aligned_or_not(w.to(grad_dtype, copy=True)), _aligned_or_not(w)):
            ops.scale_pruned_grad(gradient, weight, t, t)


def _magnitude_select(dtype: torch.dtype, device: torch.device) -> None:
    w, t = _weight_and_threshold(dtype, device)
    rank, scales = torch.zeros(1, dtype=torch.int64, device=device), t.reshape(1)
    caps = torch.ones_like(rank)
    for factors in (None, scales):
        hint = ops.magnitude_select([w], [0], rank, scales=factors, caps=caps)
        for numel in LIST_NUMELS:
            weights = [w[:numel]] * max(numel // SIZE, 1)
            list_factors = None if factors is None else factors.expand(len(weights)).contiguous()
            ops.magnitude_select(weights, [0] * len(weights), rank, scales=list_factors, hint=hint)


def _count_pruned(dtype: torch.dtype, device: torch.device) -> None:
    w, t = _weight_and_threshold(dtype, device)
    ops.count_pruned([w], [t])


def _aligned_or_not(tensor: Tensor) -> tuple[Tensor, Tensor]:
    """A view at an address that is a multiple of 16, and one at an address that is not."""
    return tensor[:-1], tensor[1:]


def _weight_and_threshold(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.ones(SIZE, dtype=dtype, device=device), torch.ones((), dtype=compute_dtype(dtype), device=device)


# without magnitude_histogram: the caller chooses its digits, and training on one device does not call it
CALLS: dict[str, Callable[[torch.dtype, torch.device], None]] = {
    "threshold": _threshold,
    "scale_pruned_grad": _scale_pruned_grad,
    "magnitude_select": _magnitude_select,
    "count_pruned": _count_pruned,
}
