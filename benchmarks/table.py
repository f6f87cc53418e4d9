"""The table of measured figures of docs/performance.md, generated from results between two markers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.backends import variant_name
from benchmarks.cases import backward, evaluation, host, import_time, memory, step, threshold, train_step
from benchmarks.networks import FOR_MEMORY
from benchmarks.results import BEYOND, MEMORY, TIME, Figures, Key, Row

BEGIN, END = "<!-- benchmarks: begin -->", "<!-- benchmarks: end -->"
FEATHER, TO_BFLOAT16 = "float32, p = 3", "float32 to bfloat16, p = 3"
PEERS = ("paper", "torch.compile", "kthvalue", "topk", "global_unstructured", "plain PyTorch")


@dataclass(frozen=True)
class Line:
    """A row of the kernels' table: a variant of ours (``{}`` for its name) on all of its inputs, against a limit."""

    text: str
    case: str
    operation: str
    variant: str
    limit: str


LINES = (
    Line("forward, float32", "threshold", FEATHER, "{}", threshold.LIMIT),
    Line("forward, float32 to bfloat16", "threshold", TO_BFLOAT16, "{}", threshold.LIMIT),
    Line("gradient scaling", "backward", backward.FLOAT32, "{}", backward.LIMIT),
    Line("gradient scaling, bfloat16 to float32", "backward", backward.FROM_BFLOAT16, "{}", "to"),
    Line("exact threshold, every step", "select", "float32", "{} steady", "sum"),
    Line("exact threshold, the first", "select", "float32", "{} cold", "sum"),
    Line("count of pruned weights", "count", "float32", "{}", "sum"),
    Line("all of a step's work", "step", step.OPERATION, "{}", step.LIMIT),
)


def make_table(rows: Sequence[Row], path: str) -> str:
    """Markdown: where it was measured, the tables, the commands; from the rows of ``results.read_full(path)``."""
    figures, last = Figures(rows), rows[-1]
    own = variant_name(last["backend"])
    sections = [list(section(figures, own)) for section in (_kernels, _train_steps, _evaluations, _memory, _host)]
    cases = " ".join(dict.fromkeys(row["case"] for row in rows))
    return "\n".join(
        [
            *_header(last, figures),
            *(line for section in sections if section for line in ("", *section)),
            "",
            "```bash",
            f"python -m benchmarks run {cases} --device {last['device']} --threads {last['threads']} --results {path}",
            f"python -m benchmarks table --results {path} --readme docs/performance.md",
            "```",
        ]
    )


def check_commits(rows: Sequence[Row]) -> None:
    """Raise ValueError unless the figures can be measured again: from commits, without changes beside them."""
    dirty = [commit for commit in Figures(rows).commits if not commit or commit.endswith("-dirty")]
    if dirty:
        raise ValueError(f"the figures must be measured on a clean commit, got {dirty[0] or 'none'}")


def insert(table: str, readme: Path) -> None:
    """Replace what stands between the markers; raises ValueError where they are missing."""
    text = readme.read_text()
    begin, end = text.find(BEGIN), text.find(END)
    if not 0 <= begin < end:
        raise ValueError(f"{readme} must hold the lines {BEGIN} and {END}, in this order")
    readme.write_text(f"{text[: begin + len(BEGIN)]}\n{table}\n{text[end:]}")


def _header(row: Row, figures: Figures) -> Iterator[str]:
    machine = row["device_name"] if row["device"] == "cuda" else f"{row['cpu']}, {row['threads']} threads"
    sets = f", kernels for {row['kernels']}" if row["kernels"] else ""
    commits = "commit " + ", ".join(figures.commits)
    yield f"{machine}{sets}; PyTorch {row['torch']}; {commits}, {row['date'][:10]}. Medians of interleaved rounds."


def _kernels(figures: Figures, own: str) -> Iterator[str]:
    lines = [line for entry in LINES for line in _line(entry, figures, own)]
    if lines:
        yield "A range is over the inputs: two distributions, three sparsities."
        yield ""
        yield "| ResNet-50's 25.5 M weights, 54 tensors | ours | divided by its limit | extra memory | others / ours |"
        yield "|---|---|---|---|---|"
        yield from lines


def _line(line: Line, figures: Figures, own: str) -> Iterator[str]:
    keys = figures.keys(line.case, line.operation, line.variant.format(own))
    times = _values(keys, lambda key: figures.value(key, TIME))
    if not times:
        return
    ratios = _values(keys, lambda key: figures.ratio(key, line.limit))
    memory = _values(keys, lambda key: figures.value(key, MEMORY))
    others = [f"{name} {text}" for name in PEERS if (text := _peer(keys, figures, name))]
    cells = [
        _range(times, _time),
        f"{_range(ratios, _ratio)} × `{line.limit}`" if ratios else "",
        _range(memory, _bytes) if memory else "",
        ", ".join(others),
    ]
    yield _row(line.text, *cells)


def _train_steps(figures: Figures, own: str) -> Iterator[str]:
    """Times divided by the dense step's in the same memory format."""
    variants = [
        *(own + train_step.suffix(grad_scale) for grad_scale in train_step.GRAD_SCALES),
        own + train_step.suffix(1.0) + train_step.RECOMPUTED,
        train_step.WITH_BYTES,
        "paper",
    ]
    lines = []
    for comparison in train_step.COMPARISONS:
        for key in figures.keys("train_step", comparison.operation, train_step.LIMIT):
            cells = [_cell(figures.ratio((*key[:4], name), train_step.LIMIT), _ratio) for name in variants]
            dense = _cell(figures.value(key, TIME), _time)
            lines.append(_row(comparison.operation, dense, *cells))
    if lines:
        yield "| train step | dense | grad_scale 1 | 0.5 | recompute=True | dense + bytes | paper |"
        yield "|---|---|---|---|---|---|---|"
        yield from lines


def _evaluations(figures: Figures, own: str) -> Iterator[str]:
    """Times divided by the dense forward's."""
    lines = []
    for network in evaluation.NETWORKS:
        for key in figures.keys("evaluation", network.title, evaluation.LIMIT):
            names = (own, own + evaluation.AVERAGED)
            cells = [_cell(figures.ratio((*key[:4], name), evaluation.LIMIT), _ratio) for name in names]
            lines.append(_row(network.title, _cell(figures.value(key, TIME), _time), *cells))
    if lines:
        yield "| evaluation under no_grad | dense | still sparse | an average, just updated |"
        yield "|---|---|---|---|"
        yield from lines


def _memory(figures: Figures, own: str) -> Iterator[str]:
    """Bytes per weight more than dense, of both modes, at three moments each."""
    lines = []
    for network in FOR_MEMORY:
        for precision in memory.PRECISIONS:
            operation = memory.operation(network, precision)
            for key in figures.keys("memory", operation, own):
                held = [_cell(figures.value((*key[:4], memory.LIMIT), field), _megabytes) for field in memory.SHOWN]
                more = (
                    [_cell(figures.value((*key[:4], name), field + memory.MORE), _signed) for field in memory.SHOWN]
                    for name in (own, own + memory.RECOMPUTED)
                )
                lines.append(_row(operation, *(" / ".join(cells) for cells in (held, *more))))
    if lines:
        yield "Memory after forward / at most until the step / at most in the step: MB; bytes a weight more than dense."
        yield ""
        yield "| training step, AdamW | dense | P(w) kept (default) | recompute=True |"
        yield "|---|---|---|---|"
        yield from lines


def _host(figures: Figures, own: str) -> Iterator[str]:
    """Time a layer beyond dense; steps and the import in a sentence each."""
    lines = []
    for path, text, variant in _host_paths(own):
        for way in host.WAYS:
            found = [
                (*key[:4], variant)
                for grad_scale in host.GRAD_SCALES
                for key in figures.keys("host", host.layer_operation(path, way, grad_scale), variant)
            ]
            if found:
                dense = _cell(figures.value((*found[0][:4], host.LIMIT), TIME), _time)
                lines.append(_row(f"{text}, {way}", dense, *(_cell(figures.value(k, BEYOND), _time) for k in found)))
    if lines:
        yield "| host time of a tiny layer, forward and backward | dense | more at grad_scale 1 | at 0.5 |"
        yield "|---|---|---|---|"
        yield from lines
    sentences = [*_step_sentences(figures, own), *_import_sentence(figures)]
    if sentences:
        yield from ("", " ".join(sentences))


def _host_paths(own: str) -> Iterator[tuple[str, str, str]]:
    yield host.CPU, "CPU", own
    yield host.STAND_IN, "GPU path, over a stand-in for the driver", host.ours(host.STAND_IN)


def _step_sentences(figures: Figures, own: str) -> Iterator[str]:
    for path, text, variant in _host_paths(own):
        for key in figures.keys("host", host.step_operation(path), variant):
            time, launches = figures.value(key, TIME), figures.value(key, host.LAUNCHES)
            if time is not None:
                counted = f" and {launches:.0f} launches" if launches and path == host.STAND_IN else ""
                yield f"`step()` of 20 layers: {_time(time)}{counted} ({text})."


def _import_sentence(figures: Figures) -> Iterator[str]:
    times = _values(figures.keys("import", "import", import_time.OURS), lambda key: figures.value(key, TIME))
    if times:
        yield f"`import feather_kernels` after `import torch`: {_range(times, _time)}."


def _row(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: float | None, text: Callable[[float], str]) -> str:
    return "" if value is None else text(value)


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
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.3f}" if ratio < 1.1 else f"{ratio:.2f}"


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.0f}"


def _signed(value: float) -> str:
    return f"{value:+.2f}"


def _bytes(count: float) -> str:
    return f"{count / 1e6:.0f} MB" if count >= 1e7 else f"{count / 1e6:.1f} MB"
