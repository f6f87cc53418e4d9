"""Reports as Markdown: a single one, or a page of many."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from feather_kernels.cli.errors import InputError
from feather_kernels.cli.gpu_report.parts import DOCTOR, HOST, SELFTEST, SPEED, STEP
from feather_kernels.cli.gpu_report.speed import COPY, OURS

Record = Mapping[str, Any]

FORMAT = 1
MEASURED, COMPUTED = "measured", "computed"
SECONDS, LAUNCHES, INSTRUCTIONS, READ, WRITTEN = "seconds", "launches", "instructions", "bytes read", "bytes written"
BASES = ("dense", "SGD.step")  # the variants with which others are compared
COMPUTED_NOTE = (
    "Computed by an executor of PTX on a CPU, not measured on a GPU: it checks results and counts launches, "
    "instructions of all threads and bytes of global memory, and says nothing about speed."
)
INTRODUCTION = """# GPU reports

Each section is a file of this folder, written by `feather-kernels gpu-report` on somebody's machine. To add yours, send
the two files by the issue form "GPU report". This page is the output of

```bash
feather-kernels gpu-report --table docs/gpu-results/*.json > docs/gpu-results/README.md
```
"""


def load(path: Path) -> Record:
    """Read a record from a file; raises InputError if it does not hold one."""
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise InputError(f"--table must be files that gpu-report wrote, got {path}: {error}") from error
    if not isinstance(record, dict) or record.get("format") != FORMAT:
        raise InputError(f"--table must be files that gpu-report wrote (format {FORMAT}), got {path}")
    return record


def report(record: Record) -> str:
    """Render one report."""
    text = next((row["text"] for row in _rows(record, DOCTOR) if "text" in row), "")
    doctor = ["", "## Doctor", "", "```text", text, "```"] if text else []
    return "\n".join(["# GPU report", "", *_body(record, "##"), *doctor]) + "\n"


def table(paths: Sequence[Path]) -> str:
    """Render a page with the reports in these files, ordered by name."""
    records = {path.stem.removeprefix("gpu-report-"): load(path) for path in sorted(paths)}
    facts = ("gpu", "compute capability", "memory", "driver", "CUDA", "torch", "triton", "feather_kernels")
    overview = [
        [name, record["kind"], *(record["machine"].get(fact, "unknown") for fact in facts), _verdicts(record)]
        for name, record in records.items()
    ]
    lines = [INTRODUCTION, *_table(["report", "figures", *facts, "parts"], overview)]
    for name, record in records.items():
        lines += ["", f"## {name}", "", *_body(record, "###")]
    return "\n".join(lines) + "\n"


def _body(record: Record, level: str) -> Iterator[str]:
    computed = record["kind"] == COMPUTED
    if computed:
        yield from (COMPUTED_NOTE, "")
    quick = ["quick: small inputs, whose times say little"] if record["quick"] and not computed else []
    yield from (f"- {line}" for line in [*(f"{key}: {value}" for key, value in record["machine"].items()), *quick])
    yield f"- date: {record['date']}"
    parts = [[part["part"], part["verdict"], part["words"]] for part in record["parts"]]
    ops = _rows(record, SPEED)
    elements = f"{ops[0]['elements']:,}" if ops else ""
    sections = {
        "Parts": _table(["part", "verdict", "in words"], parts),
        "Checks: the largest error beside the allowed one": _checks(_rows(record, SELFTEST)),
        f"Ops on {elements} elements": (_counted_ops if computed else _timed_ops)(ops),
        "A small layer and the sparsifier's step on the host": _around(_rows(record, HOST), computed),
        "Training steps": _around(_rows(record, STEP), computed),
    }
    for title, lines in sections.items():
        if lines:
            yield from ("", f"{level} {title}", "", *lines)


def _checks(rows: Sequence[Record]) -> list[str]:
    dtypes = list(dict.fromkeys(row["dtype"] for row in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        if row["wrong"] is not None:
            text = f"WRONG: {row['wrong']}"
        else:
            text = f"{row['error']:.3g} of {row['bound']:.3g} {row['unit']}" if row["bound"] else "exact"
        cells.setdefault((row["backend"], row["op"]), {})[row["dtype"]] = text
    lines = [[*key, *(found.get(dtype, "not run") for dtype in dtypes)] for key, found in cells.items()]
    return _table(["backend", "op", *dtypes], lines)


def _timed_ops(rows: Sequence[Record]) -> list[str]:
    lines = []
    for row in rows:
        head = [row["backend"], row["op"], row["what"]]
        if row["wrong"] is not None:
            lines.append([*head, f"WRONG: {row['wrong']}", "", "", ""])
            continue
        ours, copy = row[OURS][SECONDS], row[COPY][SECONDS]
        ratio, bandwidth = ours["median"] / copy["median"], row["moved"] / ours["median"] / 1e9
        lines.append([*head, _time(ours), _time(copy), f"{ratio:.2f}", f"{bandwidth:.0f}"])
    return _table(["backend", "op", "input", "time", "copy of as many bytes", "ratio", "GB/s"], lines)


def _counted_ops(rows: Sequence[Record]) -> list[str]:
    lines = []
    for row in rows:
        head, count = [row["backend"], row["op"], row["what"]], row["elements"]
        if row["wrong"] is not None:
            lines.append([*head, f"WRONG: {row['wrong']}", "", "", ""])
            continue
        ours = {name: found["median"] for name, found in row[OURS].items()}
        moved = f"{ours[READ] / count:.2f} + {ours[WRITTEN] / count:.2f}"
        per_element = f"{ours[INSTRUCTIONS] / count:.1f}"
        lines.append([*head, f"{ours[LAUNCHES]:g}", per_element, moved, f"{row['moved'] / count:g}"])
    columns = ["launches", "instructions per element", "bytes read + written per element", "at least"]
    return _table(["backend", "op", "input", *columns], lines)


def _around(rows: Sequence[Record], computed: bool) -> list[str]:
    base: Record = {}
    lines = []
    for row in rows:
        figures, head = row["figures"], [row["what"], row["variant"]]
        base = figures if row["variant"] in BASES else base
        if row["wrong"] is not None:
            lines.append([*head, f"WRONG: {row['wrong']}", ""])
        elif computed:
            lines.append([*head, *(f"{figures[name]['median']:,.0f}" for name in (LAUNCHES, INSTRUCTIONS))])
        else:
            more = figures[SECONDS]["median"] - base[SECONDS]["median"]
            ratio = figures[SECONDS]["median"] / base[SECONDS]["median"]
            lines.append([*head, _time(figures[SECONDS]), f"{1e6 * more:+.1f} µs, {ratio:.2f}x"])
    columns = [LAUNCHES, INSTRUCTIONS] if computed else ["time", "beside the first"]
    return _table(["what", "variant", *columns], lines)


def _time(found: Record) -> str:
    median, low, high = (1e6 * found[key] for key in ("median", "p20", "p80"))
    return f"{median:.1f} µs ({low:.1f} to {high:.1f})"


def _rows(record: Record, subject: str) -> list[Record]:
    """The rows of all parts of a subject; selftest-triton and selftest-cuda belong to ``selftest``."""
    parts = (part for part in record["parts"] if part["part"].partition("-")[0] == subject)
    return [row for part in parts for row in part.get("rows", ())]


def _verdicts(record: Record) -> str:
    verdicts = [part["verdict"] for part in record["parts"]]
    return ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in dict.fromkeys(verdicts))


def _table(columns: Sequence[str], lines: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table; nothing if there are no lines."""
    if not lines:
        return []
    rule = "|" + "---|" * len(columns)
    escaped = ([cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in (columns, *lines))
    head, *rest = ("| " + " | ".join(cells) + " |" for cells in escaped)
    return [head, rule, *rest]
