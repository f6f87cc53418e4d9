"""The checks of ``selftest``: every op of one backend on every dtype, against exact values.

The exact values of the thresholding operator are computed in decimal arithmetic, order statistics by sorting, and
counts by their definition.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor, nn

from feather_kernels.backends.registry import registry
from feather_kernels.cli.selftest import oracle
from feather_kernels.dtypes import WEIGHT_DTYPES, compute_dtype
from feather_kernels.sparsify import ConstantSchedule, Sparsifier

ops = torch.ops.feather_kernels

THRESHOLDS = (0.0123, 1.0, 1e-30)
POWERS = (1.0, 2.0, 3.0, 1.5, math.inf)
REPEATS = 11  # of the weights, so that they fill some blocks of a kernel and part of another
STARTS = (0, 1)  # of a view; from 1 on, its address is not a multiple of 16 bytes


@dataclass(frozen=True)
class Check:
    """One line of the result: an op of a backend on one dtype.

    Attributes:
        backend, op, dtype: what was checked.
        values: the number of values compared.
        error, bound: the largest error and the largest allowed, in ``unit``.
        unit: e.g. "ulp", or "counts differ" for a number of values.
        problem: the error that was raised, "" if none.
        seconds: how long the check took.
    """

    backend: str
    op: str
    dtype: str
    values: int
    error: float
    bound: float
    unit: str
    problem: str = ""
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        """Whether nothing was raised and the error is within its bound (NaN never is)."""
        return not self.problem and self.error <= self.bound

    @property
    def outcome(self) -> str:
        """The error and its bound, or the problem."""
        if self.unit.endswith(" differ"):
            return self.problem or f"{self.error:g} of {self.values} {self.unit}, {self.bound:g} allowed"
        return self.problem or f"error {self.error:.3g} {self.unit} in {self.values} values, {self.bound:.3g} allowed"

    def record(self) -> dict[str, object]:
        """The check for JSON, which has neither NaN nor infinity: an error that is not finite becomes null."""
        return {**asdict(self), "error": self.error if math.isfinite(self.error) else None, "passed": self.passed}


def examine(backend: str, device: torch.device) -> Iterator[Check]:
    """Run every check of one backend on one device, one after another."""
    for op, test in TESTS.items():
        for dtype in WEIGHT_DTYPES:
            begin, problem = time.perf_counter(), ""
            try:
                with registry.use_backend(backend), torch.no_grad():
                    values, error, bound, unit = test(dtype, device)
            except Exception as raised:  # whatever a broken kernel, driver or library raises is the result
                problem = " ".join(f"{type(raised).__name__}: {raised}".split())[:500]
                values, error, bound, unit = 0, math.nan, 0.0, ""
            yield Check(
                backend, op, dtype_name(dtype), values, error, bound, unit, problem, time.perf_counter() - begin
            )


def dtype_name(dtype: torch.dtype) -> str:
    """E.g. ``float32``."""
    return str(dtype).removeprefix("torch.")


Outcome = tuple[int, float, float, str]  # values compared, worst error, its bound, unit


def _threshold(dtype: torch.dtype, device: torch.device) -> Outcome:
    has = registry.backend_for(device).POWERS
    powers = [power for power in POWERS if has is None or power in has]
    narrow, wide_and_any_power = dtype in (torch.float16, torch.bfloat16), dtype == torch.float64 and has is None
    count, worst, bound = 0, 0.0, 0.55 if narrow else 5.0 if wide_and_any_power else 2.0
    for value in THRESHOLDS:
        t = torch.tensor(value, dtype=compute_dtype(dtype), device="cpu")
        weights = oracle.boundary_weights(t, dtype)
        moved = weights.repeat(REPEATS).to(device)
        for power in powers:
            leading, rest = (part.repeat(REPEATS) for part in oracle.threshold(weights, t, power))
            for start in STARTS:
                y = ops.threshold(moved[start:], t.to(device), power).cpu()
                worst = max(worst, oracle.ulp_error(y, (leading[start:], rest[start:])))
                count += y.numel()
    return count, worst, bound, "ulp"


def _scale_pruned_grad(dtype: torch.dtype, device: torch.device) -> Outcome:
    t, scale = (torch.tensor(value, dtype=compute_dtype(dtype), device="cpu") for value in (0.3, 0.25))
    weights = oracle.boundary_weights(t, dtype).repeat(REPEATS)
    gradient = weights.flip(0)
    pruned, wide = oracle.pruned(weights, t), gradient.double()
    wanted = torch.where(pruned, wide * 0.25, wide).to(
        dtype
    )  # times 0.25 is exact, except for denormals, which round once
    scaled = ops.scale_pruned_grad(*(x.to(device) for x in (gradient, weights, t, scale)))
    return weights.numel(), int((~oracle.same(scaled.cpu(), wanted)).sum()), 0, "values differ"


def _count_pruned(dtype: torch.dtype, device: torch.device) -> Outcome:
    thresholds = [
        torch.tensor(value, dtype=compute_dtype(dtype), device="cpu") for value in (*THRESHOLDS, 0.0, math.nan)
    ]
    weights = [oracle.boundary_weights(t, dtype).repeat(REPEATS) for t in thresholds]
    counts = ops.count_pruned([w.to(device) for w in weights], [t.to(device) for t in thresholds]).cpu()
    wanted = torch.stack([oracle.pruned(w, t).sum() for w, t in zip(weights, thresholds, strict=True)])
    return sum(w.numel() for w in weights), int((counts != wanted).sum()), 0, "counts differ"


def _magnitude_select(dtype: torch.dtype, device: torch.device) -> Outcome:
    generator = torch.Generator().manual_seed(0)
    shapes = ((300, 70), (999,), (0,), (41, 3, 3))
    weights = [torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype) for shape in shapes]
    weights.append(torch.tensor([0.0, math.inf, math.nan, -1.0, 1.0, 1.0], dtype=dtype, device="cpu"))
    scores = torch.cat([w.to(compute_dtype(dtype)).abs().flatten() for w in weights]).sort().values
    moved, hint, different = [w.to(device) for w in weights], None, 0
    ranks = [int((len(scores) - 1) * fraction) for fraction in (0.0, 0.5, 0.9, 0.9, 0.98, 1.0)]
    for rank in ranks:  # each takes the previous result as its hint
        position = torch.tensor([rank], dtype=torch.int64, device=device)
        hint = ops.magnitude_select(moved, [0] * len(moved), position, hint=hint)
        wanted = scores[[rank, min(rank + 1, len(scores) - 1)]]
        different += int((~oracle.same(hint[0].cpu(), wanted)).sum())
    return len(ranks) * len(scores), different, 0, "order statistics differ"


def _magnitude_histogram(dtype: torch.dtype, device: torch.device) -> Outcome:
    generator = torch.Generator().manual_seed(1)
    weights = torch.randn(5000, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
    wide = dtype == torch.float64
    keys = weights.to(compute_dtype(dtype)).abs().view(torch.int64 if wide else torch.int32).long()
    shift, bits = (52, 11) if wide else (23, 8)
    prefix = torch.zeros(1, dtype=torch.int64, device=device)
    counts = ops.magnitude_histogram([weights.to(device)], [0], prefix, shift, bits)[0].cpu()
    return len(keys), int((counts != torch.bincount(keys >> shift, minlength=1 << bits)).sum()), 0, "bins differ"


def _training_step(dtype: torch.dtype, device: torch.device) -> Outcome:
    """Compare a layer's output and gradients with plain autograd on the exactly thresholded weight."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, device=device, dtype=dtype)
    x = torch.randn(16, 64, device=device, dtype=dtype)
    weight = layer.weight.detach().cpu()
    with torch.enable_grad():
        t = Sparsifier(layer, schedule=ConstantSchedule(0.75), grad_scale=0.5).threshold.cpu()
        y = layer(x)
        y.square().sum().backward()
        leading, _ = oracle.threshold(weight.flatten(), t, 3.0)
        sparse = leading.view(weight.shape).to(device, dtype).requires_grad_()
        expected = nn.functional.linear(x, sparse, layer.bias.detach())
        expected.square().sum().backward()
    pruned, gradient = oracle.pruned(weight, t).to(device), sparse.grad
    zeros = int(pruned.sum())
    if zeros != math.floor((weight.numel() - 1) * 0.75) + 1 and dtype in (torch.float32, torch.float64):
        raise AssertionError(f"{zeros} weights of {weight.numel()} are pruned at sparsity 0.75")
    wanted = (
        torch.zeros((), dtype=dtype, device=device)
        if gradient is None
        else torch.where(pruned, gradient * 0.5, gradient)
    )
    error = max(_relative(y, expected), _relative(layer.weight.grad, wanted))
    return y.numel() + weight.numel(), error, 16 * torch.finfo(dtype).eps, "relative"


def _relative(result: Tensor | None, expected: Tensor) -> float:
    if result is None:
        return math.nan
    difference = (result.detach().double() - expected.detach().double()).abs().max()
    return float(difference / expected.detach().double().abs().max())


TESTS: dict[str, Callable[[torch.dtype, torch.device], Outcome]] = {
    "threshold": _threshold,
    "scale_pruned_grad": _scale_pruned_grad,
    "count_pruned": _count_pruned,
    "magnitude_select": _magnitude_select,
    "magnitude_histogram": _magnitude_histogram,
    "training step": _training_step,
}
