"""``feather-kernels selftest``: every op of every backend that a device offers, against exact arithmetic, in a minute.

Needs the installed package only. The exact values of the thresholding operator come from decimal arithmetic with 60
digits, order statistics from sorting, counts from the definition.
"""

from __future__ import annotations

import json
import math
import platform
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from xml.etree import ElementTree

import torch
from torch import Tensor, nn

from feather_kernels._version import __version__
from feather_kernels.backends.registry import registry
from feather_kernels.cli import exact
from feather_kernels.dtypes import WEIGHT_DTYPES, compute_dtype
from feather_kernels.sparsify import ConstantSchedule, Sparsifier

ops = torch.ops.feather_kernels

THRESHOLDS = (0.0123, 1.0, 1e-30)
POWERS = (1.0, 2.0, 3.0, 1.5, math.inf)
REPEATS = 11  # of the weights: some whole blocks of a kernel, and a part of one
STARTS = (0, 1)  # 1: a view that 16 bytes do not divide


@dataclass(frozen=True)
class Check:
    """One line of the result: an op of a backend on one dtype, which took ``seconds``.

    ``error`` and ``bound`` are in ``unit``; ``problem`` is what was raised.
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
        """Whether nothing was raised and the error keeps its bound (NaN does not)."""
        return not self.problem and self.error <= self.bound

    @property
    def outcome(self) -> str:
        """The error beside its bound, or the problem."""
        return self.problem or f"{self.error:.3g} {self.unit} of {self.bound:.3g} in {self.values} values"

    def record(self) -> dict[str, object]:
        """For JSON, which has neither NaN nor infinity: an error that is not finite is null."""
        return {**asdict(self), "error": self.error if math.isfinite(self.error) else None, "passed": self.passed}


def run(
    device: torch.device,
    json_file: Path | None = None,
    junit_file: Path | None = None,
    required: Sequence[str] = (),
) -> int:
    """Test the device, print a table and write the files.

    Returns:
        The exit code: 1 if a check failed, nothing ran, or a ``required`` backend cannot run.
    """
    offered = registry.availability(device)
    offered |= {name: f"is not for {device.type} devices" for name in required if name not in offered}
    checks: list[Check] = []
    for backend, reason in offered.items():
        if junit_file is not None:  # should a check end this process, the file says which did not run
            junit_file.write_bytes(junit(offered, checks, required))
        print(f"{backend} on {device}: {reason or 'available'}", flush=True)
        if reason is None:
            for check in examine(backend, device):
                verdict = "passed" if check.passed else "FAILED"
                print(f"  {verdict}  {check.op:<20} {check.dtype:<9} {check.outcome}", flush=True)
                checks.append(check)
    failed, absent = sum(not check.passed for check in checks), [name for name in required if offered[name] is not None]
    print(f"{len(checks) - failed} passed, {failed} failed")
    for name in absent:
        print(f"FAILED: {name} is required and cannot run")
    if json_file is not None:
        json_file.write_text(json.dumps(_record(device, offered, checks), indent=1, allow_nan=False) + "\n")
    if junit_file is not None:
        junit_file.write_bytes(junit(offered, checks, required))
    return int(failed > 0 or not checks or bool(absent))


def examine(backend: str, device: torch.device) -> Iterator[Check]:
    """The checks of one backend on one device."""
    for op, test in TESTS.items():
        for dtype in WEIGHT_DTYPES:
            begin, problem = time.perf_counter(), ""
            try:
                with registry.use_backend(backend), torch.no_grad():
                    values, error, bound, unit = test(dtype, device)
            except Exception as raised:  # whatever a broken kernel, driver or library makes of it is the finding
                problem = " ".join(f"{type(raised).__name__}: {raised}".split())[:500]
                values, error, bound, unit = 0, math.nan, 0.0, ""
            yield Check(backend, op, _name(dtype), values, error, bound, unit, problem, time.perf_counter() - begin)


def junit(offered: dict[str, str | None], checks: Sequence[Check], required: Sequence[str] = ()) -> bytes:
    """JUnit XML: a suite for each backend, a case for each op and dtype; names are the same on every machine.

    Args:
        offered: each backend with the reason why it cannot run, or None; its cases are skipped with that reason.
        checks: those of the backends that can run. A case whose check is missing is an error.
        required: backends whose cases are errors where they cannot run.
    """
    done = {(check.backend, check.op, check.dtype): check for check in checks}
    root = ElementTree.Element("testsuites", name="feather-kernels selftest")
    for backend, reason in offered.items():
        suite = ElementTree.SubElement(root, "testsuite", name=f"selftest.{backend}")
        counts = dict.fromkeys(("failure", "error", "skipped"), 0)
        for op, dtype in product(TESTS, map(_name, WEIGHT_DTYPES)):
            check = done.get((backend, op, dtype))
            name, seconds = f"{op.replace(' ', '_')}[{dtype}]", 0.0 if check is None else check.seconds
            attributes = {"classname": f"feather_kernels.selftest.{backend}", "name": name, "time": f"{seconds:.3f}"}
            case = ElementTree.SubElement(suite, "testcase", attributes)
            if reason is not None:
                _ending(case, "error" if backend in required else "skipped", reason, counts)
            elif check is None:
                _ending(case, "error", "the check did not run", counts)
            elif not check.passed:
                _ending(case, "failure", check.outcome, counts)
        totals = {"tests": len(suite), "failures": counts["failure"], "errors": counts["error"]}
        spent = sum(check.seconds for check in checks if check.backend == backend)
        for key, value in {**totals, "skipped": counts["skipped"], "time": f"{spent:.3f}"}.items():
            suite.set(key, str(value))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def _ending(case: ElementTree.Element, kind: str, message: str, counts: dict[str, int]) -> None:
    counts[kind] += 1
    legal = re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", message)  # XML 1.0, 2.2
    ElementTree.SubElement(case, kind, message=legal)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


Outcome = tuple[int, float, float, str]  # values compared, worst error, its bound, unit


def _threshold(dtype: torch.dtype, device: torch.device) -> Outcome:
    has = registry.backend_for(device).POWERS
    powers = [power for power in POWERS if has is None or power in has]
    narrow, wide_and_any_power = dtype in (torch.float16, torch.bfloat16), dtype == torch.float64 and has is None
    count, worst, bound = 0, 0.0, 0.55 if narrow else 5.0 if wide_and_any_power else 2.0
    for value in THRESHOLDS:
        t = torch.tensor(value, dtype=compute_dtype(dtype), device="cpu")
        weights = exact.boundary_weights(t, dtype)
        moved = weights.repeat(REPEATS).to(device)
        for power in powers:
            leading, rest = (part.repeat(REPEATS) for part in exact.threshold(weights, t, power))
            for start in STARTS:
                y = ops.threshold(moved[start:], t.to(device), power).cpu()
                worst = max(worst, exact.ulp_error(y, (leading[start:], rest[start:])))
                count += y.numel()
    return count, worst, bound, "ulp"


def _scale_pruned_grad(dtype: torch.dtype, device: torch.device) -> Outcome:
    t, scale = (torch.tensor(value, dtype=compute_dtype(dtype), device="cpu") for value in (0.3, 0.25))
    weights = exact.boundary_weights(t, dtype).repeat(REPEATS)
    gradient = weights.flip(0)
    pruned, wide = exact.pruned(weights, t), gradient.double()
    wanted = torch.where(pruned, wide * 0.25, wide).to(dtype)  # 0.25: exact but for denormals, which round once
    scaled = ops.scale_pruned_grad(*(x.to(device) for x in (gradient, weights, t, scale)))
    return weights.numel(), int((~exact.same(scaled.cpu(), wanted)).sum()), 0, "values differ"


def _count_pruned(dtype: torch.dtype, device: torch.device) -> Outcome:
    thresholds = [
        torch.tensor(value, dtype=compute_dtype(dtype), device="cpu") for value in (*THRESHOLDS, 0.0, math.nan)
    ]
    weights = [exact.boundary_weights(t, dtype).repeat(REPEATS) for t in thresholds]
    counts = ops.count_pruned([w.to(device) for w in weights], [t.to(device) for t in thresholds]).cpu()
    wanted = torch.stack([exact.pruned(w, t).sum() for w, t in zip(weights, thresholds, strict=True)])
    return sum(w.numel() for w in weights), int((counts != wanted).sum()), 0, "counts differ"


def _magnitude_select(dtype: torch.dtype, device: torch.device) -> Outcome:
    generator = torch.Generator().manual_seed(0)
    shapes = ((300, 70), (999,), (0,), (41, 3, 3))
    weights = [torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype) for shape in shapes]
    weights.append(torch.tensor([0.0, math.inf, math.nan, -1.0, 1.0, 1.0], dtype=dtype, device="cpu"))
    scores = torch.cat([w.to(compute_dtype(dtype)).abs().flatten() for w in weights]).sort().values
    moved, hint, different = [w.to(device) for w in weights], None, 0
    ranks = [int((len(scores) - 1) * fraction) for fraction in (0.0, 0.5, 0.9, 0.9, 0.98, 1.0)]
    for rank in ranks:  # each with the result before it as hint
        position = torch.tensor([rank], dtype=torch.int64, device=device)
        hint = ops.magnitude_select(moved, [0] * len(moved), position, hint=hint)
        wanted = scores[[rank, min(rank + 1, len(scores) - 1)]]
        different += int((~exact.same(hint[0].cpu(), wanted)).sum())
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
    """A layer's output and gradients against plain autograd on the exact weight, thresholded at the layer's T."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 48, device=device, dtype=dtype)
    x = torch.randn(16, 64, device=device, dtype=dtype)
    weight = layer.weight.detach().cpu()
    with torch.enable_grad():
        t = Sparsifier(layer, schedule=ConstantSchedule(0.75), grad_scale=0.5).threshold.cpu()
        y = layer(x)
        y.square().sum().backward()
        leading, _ = exact.threshold(weight.flatten(), t, 3.0)
        sparse = leading.view(weight.shape).to(device, dtype).requires_grad_()
        expected = nn.functional.linear(x, sparse, layer.bias.detach())
        expected.square().sum().backward()
    pruned, gradient = exact.pruned(weight, t).to(device), sparse.grad
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


def _record(device: torch.device, offered: dict[str, str | None], checks: list[Check]) -> dict[str, object]:
    return {
        "feather_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "unavailable": {name: reason for name, reason in offered.items() if reason is not None},
        "checks": [check.record() for check in checks],
    }
