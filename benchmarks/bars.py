"""The bars: what the package promises about its speed, checked against results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.backends import variant_name
from benchmarks.cases import backward, host, import_time, memory, step, threshold, train_step
from benchmarks.networks import FOR_MEMORY, RESNET20, RESNET50_128, RESNET50_224
from benchmarks.results import MEMORY, TIME, Figures, Key, Row
from benchmarks.table import FEATHER, TO_BFLOAT16

OURS = "OURS"  # stands for the default backend's variant
PLAIN = "float32"


@dataclass(frozen=True)
class Bar:
    """A bound on a figure of a variant, on every input where it was measured.

    Attributes:
        text: what is bounded.
        case, operation, variant: what was measured.
        bound: the largest figure allowed; with ``peer`` the smallest.
        limit: the figure is the time divided by this variant's.
        peer: the figure is this variant's time divided by ours.
        metric: the figure where there is neither limit nor peer.
        beyond: of ``metric``, what this variant has is subtracted.
        beside: this variant's ``metric`` is shown beside the figure, to compare machines by; default ``beyond``.
    """

    text: str
    case: str
    operation: str
    variant: str
    bound: float
    limit: str | None = None
    peer: str | None = None
    metric: str = TIME
    beyond: str | None = None
    beside: str | None = None

    def figure(self, figures: Figures, key: Key) -> float | None:
        """The figure on one input."""
        if self.limit is not None:
            return figures.ratio(key, self.limit)
        if self.peer is not None:
            ratio = figures.ratio(key, self.peer)
            return None if ratio is None else 1 / ratio
        value = figures.value(key, self.metric)
        if value is None or self.beyond is None:
            return value
        other = figures.value((*key[:4], self.beyond), self.metric)
        return None if other is None else value - other

    def scale(self, figures: Figures, key: Key) -> tuple[str, float] | None:
        """The variant to compare machines by, and its metric."""
        variant = self.beside or self.beyond
        value = None if variant is None else figures.value((*key[:4], variant), self.metric)
        return None if variant is None or value is None else (variant, value)

    def holds(self, figure: float) -> bool:
        """Whether a figure is within the bound."""
        return figure >= self.bound if self.peer is not None else figure <= self.bound


def bars(has_avx512: bool) -> tuple[Bar, ...]:
    """The bars for a CPU."""
    return (*_kernel_bars(has_avx512), *_train_step_bars(), *_host_bars(), *_memory_bars())


def _kernel_bars(has_avx512: bool) -> tuple[Bar, ...]:
    forward, steady, cold = (1.5 if has_avx512 else 2.2), f"{OURS} steady", f"{OURS} cold"
    return (
        Bar("forward into out= / copy_", "threshold", FEATHER, OURS, forward, limit=threshold.LIMIT),
        Bar("forward float32 -> bfloat16 / copy_", "threshold", TO_BFLOAT16, OURS, 1.5, limit=threshold.LIMIT),
        Bar("gradient scaling / torch.mul(g, w)", "backward", backward.FLOAT32, OURS, 1.15, limit=backward.LIMIT),
        Bar("count_pruned / sum", "count", PLAIN, OURS, 1.6, limit="sum"),
        Bar("selection, steady / sum", "select", PLAIN, steady, 1.6, limit="sum"),
        Bar("selection, cold / sum", "select", PLAIN, cold, 5.0, limit="sum"),
        Bar("selection, steady: extra MB", "select", PLAIN, steady, 4e6, metric=MEMORY),
        Bar("selection, cold: extra MB", "select", PLAIN, cold, 4e6, metric=MEMORY),
        Bar("paper's step / ours", "step", step.OPERATION, OURS, 150, peer="paper"),
        Bar("torch.compile's step / ours", "step", step.OPERATION, OURS, 15, peer="torch.compile"),
    )


def _train_step_bars() -> Iterator[Bar]:
    bounds = {  # network, channels_last -> at grad_scale 1, at 0.5
        (RESNET50_224, False): (1.025, 1.03),
        (RESNET50_128, False): (1.05, 1.07),
        (RESNET20, False): (1.015, 1.02),
        (RESNET50_224, True): (1.025, 1.035),
        (RESNET50_128, True): (1.06, 1.09),
    }
    for comparison in train_step.COMPARISONS:
        both = bounds[comparison.network, comparison.channels_last]
        for grad_scale, bound in zip(train_step.GRAD_SCALES, both, strict=True):
            operation, suffix = comparison.operation, train_step.suffix(grad_scale)
            text = f"{operation.replace(', batch', ' x')},{suffix} / dense"
            yield Bar(text, "train_step", operation, OURS + suffix, bound, limit=train_step.LIMIT)


def _host_bars() -> Iterator[Bar]:
    """Absolute times, set on a fast machine: read them beside the dense layer's own."""
    bounds = {  # path, way -> us a layer at grad_scale 1, at 0.5
        (host.STAND_IN, "eager"): (20, 36),
        (host.STAND_IN, "compiled"): (18, 20),
        (host.CPU, "eager"): (14, 22),
        (host.CPU, "compiled"): (10, 10),
    }
    names = {host.STAND_IN: "GPU path", host.CPU: "CPU"}
    beyond, launches = host.LIMIT, host.LAUNCHES
    for (path, way), both in bounds.items():
        for grad_scale, bound in zip(host.GRAD_SCALES, both, strict=True):
            operation, text = host.layer_operation(path, way, grad_scale), f"{names[path]}, {way}, {grad_scale:g}"
            variant = host.ours(path) if path == host.STAND_IN else OURS
            yield Bar(f"us a layer beyond dense: {text}", "host", operation, variant, bound * 1e-6, beyond=beyond)
            if (path, way) == (host.STAND_IN, "eager"):
                allowed, text = (1 if grad_scale == 1 else 2), f"launches a layer beyond dense: {text}"
                yield Bar(text, "host", operation, variant, allowed, metric=launches, beyond=beyond)
    operation, variant = host.step_operation(host.STAND_IN), host.ours(host.STAND_IN)
    yield Bar("step() of 20 layers, GPU path", "host", operation, variant, 240e-6, beside=host.STEP_LIMIT)
    yield Bar("launches of step(), GPU path", "host", operation, variant, 20, metric=launches, beside=host.STEP_LIMIT)
    importing, ours = import_time.LIMIT, import_time.OURS
    yield Bar("import beyond torch", "import", "import", ours, 0.050, beside=importing)


def _memory_bars() -> Iterator[Bar]:
    """Attention layers keep P(w) in any mode: a third of the weights of ViT-B/16, 1.31 bytes a weight in float32."""
    until_step, forward = "peak_until_step" + memory.MORE, "after_forward" + memory.MORE
    for network in FOR_MEMORY:
        autocast, float32 = (memory.operation(network, name) for name in (memory.AUTOCAST, memory.FLOAT32))
        text = f"B/weight beyond dense, {network.title}"
        yield Bar(f"{text}: autocast, peak until step", "memory", autocast, OURS, 0.1, metric=until_step)
        recomputed, allowed = OURS + memory.RECOMPUTED, (1.4 if network.title.startswith("ViT") else 0.1)
        yield Bar(f"{text}: recompute=True, after forward", "memory", float32, recomputed, allowed, metric=forward)


class Verdict(NamedTuple):
    """What the results say about a bar."""

    bar: Bar
    holds: bool | None  # None where it was not measured
    worst: float | None
    best: float | None
    inputs: int
    where: str  # the worst input, or why there is no figure
    scale: tuple[str, float] | None = None  # a variant to compare machines by, and its metric there


def judge(rows: Sequence[Row]) -> Iterator[Verdict]:
    """A verdict for each bar, from full-size rows of one machine (``results.read_full``)."""
    figures = Figures(rows)
    own = variant_name(rows[-1]["backend"])
    for bar in bars(has_avx512=rows[-1]["kernels"].startswith("avx512")):
        yield _verdict(bar, figures, bar.variant.replace(OURS, own))


def _verdict(bar: Bar, figures: Figures, variant: str) -> Verdict:
    keys = figures.keys(bar.case, bar.operation, variant)
    measured = [(figure, key) for key in keys if (figure := bar.figure(figures, key)) is not None]
    failed = [key for key in keys if not figures.value(key, "gate")]
    if failed:
        return Verdict(bar, False, None, None, len(keys), f"gate failed: {_place(failed[0])}")
    if not measured:
        return Verdict(bar, None, None, None, 0, "not measured")
    ordered = sorted(measured, reverse=bar.peer is None)
    (worst, place), (best, _) = ordered[0], ordered[-1]
    holds = all(bar.holds(figure) for figure, _ in measured)
    return Verdict(bar, holds, worst, best, len(measured), _place(place), bar.scale(figures, place))


def _place(key: Key) -> str:
    return ", ".join(part for part in key[2:4] if part)


def format_verdicts(verdicts: Sequence[Verdict]) -> str:
    """A line for each bar: verdict, bound, worst figure, where, and the figure to compare machines by."""
    lines = []
    for bar, holds, worst, best, inputs, where, scale in verdicts:
        word = {True: "pass", False: "FAIL", None: "-"}[holds]
        factor, unit = _unit(bar)
        bound = f"{'>=' if bar.peer else '<='} {bar.bound * factor:g}{unit}"
        figure = "" if worst is None else f"{worst * factor:.4g}"
        if inputs > 1 and best is not None:
            figure += f" (best {best * factor:.4g}, {inputs} inputs)"
        beside = "" if scale is None else f"{scale[0]} {scale[1] * factor:.4g}{unit}"
        lines.append(f"{word:4}  {bar.text:76} {bound:>10}  {figure:30} {'; '.join(filter(None, (where, beside)))}")
    return "\n".join(lines)


def _unit(bar: Bar) -> tuple[float, str]:
    if bar.limit is None and bar.peer is None:
        if bar.metric == MEMORY:
            return 1e-6, " MB"
        if bar.metric == TIME:
            return (1e6, " us") if bar.bound < 1e-3 else (1e3, " ms")
    return 1.0, ""
