"""The part that times each op beside a plain copy of as many bytes, once its result agrees with the reference."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from feather_kernels.backends.registry import registry
from feather_kernels.cli.gpu_report.clock import interleaved, spread
from feather_kernels.cli.selftest import oracle

if TYPE_CHECKING:
    from feather_kernels.cli.gpu_report.target import Target

ops = torch.ops.feather_kernels

DEVIATION, T, SPARSITY = 0.05, 0.08, 0.9
TENSORS = 16  # in a list
DRIFT = 1e-3  # how far an optimizer step moves a weight, in standard deviations
OURS, COPY = "ours", "copy"


@dataclass(frozen=True)
class Work:
    """An op on an input.

    Attributes:
        op, what: name the op and the input.
        moved: the bytes that must be read and written at least.
        run: calls the op.
        relative: the largest relative error allowed.
    """

    op: str
    what: str
    moved: int
    run: Callable[[], Tensor]
    relative: float = 0.0


def rows(target: Target, backend: str) -> Iterator[dict[str, object]]:
    """Yield what each op and the copy beside it cost; an op with a wrong result is not timed."""
    target.require(backend)
    meter = target.on_device()
    with torch.no_grad():
        for work in works(target):
            row: dict[str, object] = {"backend": backend, "op": work.op, "what": work.what, "elements": target.elements}
            with registry.use_backend("reference"):
                wanted = work.run().clone()
            with registry.use_backend(backend):
                wrong = difference(work.run(), wanted, work.relative)
                if wrong is None:
                    source = torch.ones(work.moved // 2, dtype=torch.uint8, device=target.device)
                    copy = torch.empty_like(source)
                    copy.copy_(source)
                    variants: dict[str, Callable[[], object]] = {OURS: work.run, COPY: partial(copy.copy_, source)}
                    counts = dict.fromkeys(variants, target.rounds)
                    runs = {name: partial(meter, run) for name, run in variants.items()}
                    found = interleaved(runs, counts, target.rounds)
                    row |= {name: spread(figures) for name, figures in found.items()}
            yield {**row, "moved": work.moved, "wrong": wrong}


def difference(result: Tensor, wanted: Tensor, relative: float) -> str | None:
    """How the result differs from the wanted one, or None; zeros must be in the same places."""
    if relative == 0:
        same = oracle.same(result, wanted) if result.is_floating_point() else result == wanted
    else:
        far = (result.double() - wanted.double()).abs() > relative * wanted.double().abs()
        same = ~far & ((result == 0) == (wanted == 0))
    count = int((~same).sum())
    return f"{count} of {same.numel()} values differ from the reference backend's" if count else None


def works(target: Target) -> Iterator[Work]:
    """The ops and their inputs: thresholding, the scaling of gradients, and the ops on lists of weights."""
    count, generator = target.elements, torch.Generator(target.device).manual_seed(0)
    w, g = (
        torch.randn(count, generator=generator, dtype=torch.float32, device=target.device).mul_(DEVIATION)
        for _ in range(2)
    )
    t, scale = (torch.tensor(value, dtype=torch.float32, device=target.device) for value in (T, 0.5))
    low = w.bfloat16()
    for power in (3.0, 2.0, 1.0, math.inf):
        yield _threshold(w, t, power, torch.float32)
    yield _threshold(w, t, 3.0, torch.bfloat16)
    yield _threshold(low, t, 3.0, torch.bfloat16)
    for gradient, weight in ((g, w), (g.bfloat16(), w), (g.bfloat16(), low)):
        what = _name(gradient.dtype, weight.dtype)
        moved = gradient.nbytes + 2 * weight.nbytes
        yield Work("scale_pruned_grad", what, moved, partial(ops.scale_pruned_grad, gradient, weight, t, scale))
    yield from _on_lists(target, w, w + g * DRIFT, t)


def _threshold(w: Tensor, t: Tensor, power: float, dtype: torch.dtype) -> Work:
    out = torch.empty_like(w, dtype=dtype)

    def run() -> Tensor:
        ops.threshold.out(w, t, power, out=out)
        return out

    what = f"{_name(w.dtype, dtype)}, p = {power:g}"
    ulps = 4 if dtype == torch.float32 else 1  # twice the error allowed to each of the two, rounded
    return Work("threshold", what, w.nbytes + out.nbytes, run, ulps * torch.finfo(dtype).eps)


def _on_lists(target: Target, w: Tensor, drifted: Tensor, t: Tensor) -> Iterator[Work]:
    before, now, groups = list(w.chunk(TENSORS)), list(drifted.chunk(TENSORS)), [0] * TENSORS
    rank = torch.tensor([math.floor((w.numel() - 1) * SPARSITY)], dtype=torch.int64, device=target.device)
    hint = ops.magnitude_select(before, groups, rank)
    what = f"float32, {TENSORS} tensors"
    select = partial(ops.magnitude_select, now, groups, rank)
    yield Work("magnitude_select", f"{what}, steady", w.nbytes, partial(select, hint=hint))
    yield Work("magnitude_select", f"{what}, cold", w.nbytes, select)
    yield Work("count_pruned", what, w.nbytes, partial(ops.count_pruned, now, [t] * TENSORS))
    start = torch.zeros(1, dtype=torch.int64, device=target.device)
    yield Work("magnitude_histogram", what, w.nbytes, partial(ops.magnitude_histogram, now, groups, start, 23, 8))


def _name(source: torch.dtype, target: torch.dtype) -> str:
    names = [str(dtype).removeprefix("torch.") for dtype in (source, target)]
    return names[0] if source == target else " to ".join(names)
