"""The README's table of measured figures, generated from results between two markers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.backends import variant_name
from benchmarks.cases import backward, call, import_time, step, threshold, train_step
from benchmarks.results import MEMORY, TIME, Figures, Key, Row

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
FEATHER, TO_BFLOAT16 = "float32, p = 3", "float32 to bfloat16, p = 3"
PEERS = ("paper", "torch.compile", "kthvalue", "topk", "global_unstructured", "plain PyTorch")


@dataclass(frozen=True)
class Line:
    """A row of the table: a variant of ours (``{}`` for its name) on all of its inputs, against a limit."""

    text: str
    case: str
    operation: str
    variant: str
    limit: str


LINES = (
    Line("forward, float32", "threshold", FEATHER, "{}", threshold.LIMIT),
    Line("forward, float32 to bfloat16", "threshold", TO_BFLOAT16, "{}", threshold.LIMIT),
    Line("gradient scaling, in place", "backward", backward.IN_PLACE, "{}", backward.LIMIT),
    Line("gradient scaling, in place, beside fewer bytes", "backward", backward.IN_PLACE, "{}", backward.NUMBER),
    Line("gradient scaling, bfloat16 to float32", "backward", backward.FROM_BFLOAT16, "{}", "to"),
    Line("exact threshold, every step", "select", "float32", "{} steady", "sum"),
    Line("exact threshold, the first", "select", "float32", "{} cold", "sum"),
    Line("count of pruned weights", "count", "float32", "{}", "sum"),
    Line("all of a step's work", "step", step.OPERATION, "{}", step.LIMIT),
    *(
        Line(f"train step, {network.title}{text}", "train_step", network.title, "{}", limit)
        for network in train_step.NETWORKS
        for text, limit in (("", "dense"), (", beside its bytes", train_step.WITH_BYTES))
    ),
    Line("differentiable call, 1,024 weights", "call", call.FORWARD, "{}", call.LIMIT),
)


def make_table(rows: Sequence[Row], path: str) -> str:
    """Markdown: where it was measured, the table, the commands; from the rows of ``results.read_full(path)``."""
    figures, last = Figures(rows), rows[-1]
    own = variant_name(last["backend"])
    body = [line for entry in LINES for line in _line(entry, figures, own)]
    cases = " ".join(dict.fromkeys(row["case"] for row in rows))
    return "\n".join(
        [
            *_header(last),
            "",
            "| ResNet-50's 25.5 M weights in 54 tensors | ours | divided by its limit | extra memory | others / ours |",
            "|---|---|---|---|---|",
            *body,
            *_import_line(figures),
            "",
            "```bash",
            f"python -m benchmarks run {cases} --device {last['device']} --threads {last['threads']} --results {path}",
            f"python -m benchmarks table --results {path} --readme README.md",
            "```",
        ]
    )


def insert(table: str, readme: Path) -> None:
    """Replace what stands between the markers; raises ValueError where they are missing."""
    text = readme.read_text()
    begin, end = text.find(BEGIN), text.find(END)
    if not 0 <= begin < end:
        raise ValueError(f"{readme} must hold the lines {BEGIN} and {END}, in this order")
    readme.write_text(f"{text[: begin + len(BEGIN)]}\n{table}\n{text[end:]}")


def _header(row: Row) -> Iterator[str]:
    machine = row["device_name"] if row["device"] == "cuda" else f"{row['cpu']}, {row['threads']} threads"
    sets = f", kernels for {row['kernels']}" if row["kernels"] else ""
    yield f"{machine}{sets}; PyTorch {row['torch']}; commit {row['commit']}, {row['date'][:10]}."
    yield "Medians of interleaved rounds; a range is over the inputs (two distributions, three sparsities)."


def _line(line: Line, figures: Figures, own: str) -> Iterator[str]:
    keys = figures.keys(line.case, line.operation, line.variant.format(own))
    times = _values(keys, lambda key: figures.value(key, TIME))
    if not times:
        return
    ratios = _values(keys, lambda key: figures.ratio(key, line.limit))
    if not ratios and line.limit == train_step.WITH_BYTES:  # results before that was measured
        return
    memory = _values(keys, lambda key: figures.value(key, MEMORY))
    others = [f"{name} {text}" for name in PEERS if (text := _peer(keys, figures, name))]
    cells = [
        line.text,
        _range(times, _time),
        f"{_range(ratios, _ratio)} × {_limit_name(line)}" if ratios else "",
        _range(memory, _bytes) if memory and line.case != "call" else "",
        ", ".join(others),
    ]
    yield f"| {' | '.join(cells)} |"


def _limit_name(line: Line) -> str:
    if line.limit == train_step.WITH_BYTES:
        return f"({line.limit})"
    return line.limit if line.case in ("train_step", "call") else f"`{line.limit}`"


def _import_line(figures: Figures) -> Iterator[str]:
    keys = figures.keys("import", "import", import_time.OURS)
    times = _values(keys, lambda key: figures.value(key, TIME))
    if times:
        yield f"| `import feather_kernels` after `import torch` | {_range(times, _time)} | | | |"


def _peer(keys: Sequence[Key], figures: Figures, name: str) -> str:
    ratios = _values(keys, lambda key: figures.ratio(key, name))
    return f"{_range([1 / ratio for ratio in ratios], _ratio)} ×" if ratios else ""


def _values(keys: Sequence[Key], figure: Callable[[Key], float | None]) -> list[float]:
    return [value for key in keys if (value := figure(key)) is not None]


def _range(values: Sequence[float], text: Callable[[float], str]) -> str:
    low, high = text(min(values)), text(max(values))
    return low if low == high else f"{low} – {high}"


def _time(seconds: float) -> str:
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} µs"


def _ratio(ratio: float) -> str:
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2f}"


def _bytes(count: float) -> str:
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.1f} MB"
