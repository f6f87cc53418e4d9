"""The bars: what the package promises about its speed, checked against results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from benchmarks.backends import variant_name
from benchmarks.cases import backward, call, import_time, step, threshold
from benchmarks.results import MEMORY, TIME, Figures, Key, Row

OURS = "OURS"  # stands for the default backend's variant
PLAIN = "float32"
FEATHER = "float32, p = 3"
TO_BFLOAT16 = "float32 to bfloat16, p = 3"


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
    """

    text: str
    case: str
    operation: str
    variant: str
    bound: float
    limit: str | None = None
    peer: str | None = None
    metric: str = ""

    def figure(self, figures: Figures, key: Key) -> float | None:
        """The figure on one input."""
        if self.limit is not None:
            return figures.ratio(key, self.limit)
        if self.peer is not None:
            ratio = figures.ratio(key, self.peer)
            return None if ratio is None else 1 / ratio
        return figures.value(key, self.metric)

    def holds(self, figure: float) -> bool:
        """Whether a figure is within the bound."""
        return figure >= self.bound if self.peer is not None else figure <= self.bound


def bars(has_avx512: bool) -> tuple[Bar, ...]:
    """The bars for a CPU."""
    forward = 1.5 if has_avx512 else 2.2
    return (
        Bar("forward into out= / copy_", "threshold", FEATHER, OURS, forward, limit=threshold.LIMIT),
        Bar("forward float32 -> bfloat16 / copy_", "threshold", TO_BFLOAT16, OURS, 1.5, limit=threshold.LIMIT),
        Bar("in-place gradient scaling / g.mul_(w)", "backward", backward.IN_PLACE, OURS, 1.15, limit=backward.LIMIT),
        Bar("count_pruned / sum", "count", PLAIN, OURS, 1.6, limit="sum"),
        Bar("selection, steady / sum", "select", PLAIN, f"{OURS} steady", 1.6, limit="sum"),
        Bar("selection, cold / sum", "select", PLAIN, f"{OURS} cold", 5.0, limit="sum"),
        Bar("selection, steady: extra MB", "select", PLAIN, f"{OURS} steady", 4e6, metric=MEMORY),
        Bar("selection, cold: extra MB", "select", PLAIN, f"{OURS} cold", 4e6, metric=MEMORY),
        Bar("paper's step / ours", "step", step.OPERATION, OURS, 150, peer="paper"),
        Bar("torch.compile's step / ours", "step", step.OPERATION, OURS, 15, peer="torch.compile"),
        Bar("train step / dense, ResNet-50 224 px", "train_step", "ResNet-50, 224 px, batch 8", OURS, 1.03, "dense"),
        Bar("train step / dense, ResNet-50 128 px", "train_step", "ResNet-50, 128 px, batch 8", OURS, 1.08, "dense"),
        Bar("train step / dense, ResNet-20", "train_step", "ResNet-20, 32 px, batch 128", OURS, 1.05, "dense"),
        Bar("differentiable call / empty Function", "call", call.FORWARD, OURS, 2.2, limit=call.LIMIT),
        Bar("import beyond torch, ms", "import", "import", import_time.OURS, 0.050, metric=TIME),
    )


class Verdict(NamedTuple):
    """What the results say about a bar."""

    bar: Bar
    holds: bool | None  # None where it was not measured
    worst: float | None
    best: float | None
    inputs: int
    where: str  # the worst input, or why there is no figure


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
    return Verdict(bar, all(bar.holds(figure) for figure, _ in measured), worst, best, len(measured), _place(place))


def _place(key: Key) -> str:
    return ", ".join(part for part in key[2:4] if part)


def format_verdicts(verdicts: Sequence[Verdict]) -> str:
    """A line for each bar: verdict, bound, worst figure and where."""
    lines = []
    for bar, holds, worst, best, inputs, where in verdicts:
        word = {True: "pass", False: "FAIL", None: "-"}[holds]
        scale, unit = _unit(bar)
        bound = f"{'>=' if bar.peer else '<='} {bar.bound * scale:g}{unit}"
        figure = (
            "" if worst is None or best is None else f"{worst * scale:.3g} (best {best * scale:.3g}, {inputs} inputs)"
        )
        lines.append(f"{word:4}  {bar.text:40} {bound:>10}  {figure:32} {where}")
    return "\n".join(lines)


def _unit(bar: Bar) -> tuple[float, str]:
    return {MEMORY: (1e-6, " MB"), TIME: (1e3, " ms")}.get(bar.metric, (1.0, ""))
