"""Bugs planted in the Triton kernels, one textual change each, and the check that catches each one.

A check compares an op with the oracle on the executor. It passes on an unchanged copy of the file.
"""

from __future__ import annotations

import importlib.util
import re
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from feather_kernels.backends.interface import Histogram, Selection
from tests.conftest import PTX_ARCHITECTURE
from tests.support import oracle, samples
from tools.ptx_executor import errors

pytestmark = pytest.mark.skipif(not PTX_ARCHITECTURE, reason="needs the PTX executor")

BACKENDS = "feather_kernels.backends"
Check = Callable[[ModuleType], None]


@pytest.fixture(autouse=True)
def no_constants_from_before(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a bug leaves on the device is not for the next test."""
    from feather_kernels.backends import device_constants

    monkeypatch.setattr(device_constants, "_kept", OrderedDict())


@dataclass(frozen=True)
class Bug:
    """``pattern``, found once in ``file``, becomes ``replacement``; ``check`` then raises ``error``: ``message``."""

    name: str
    file: str
    pattern: str
    replacement: str
    check: Check
    error: str  # a class of ptx_executor.errors, or AssertionError: wrong values
    message: str = r"assert .* <= |different places"

    def __str__(self) -> str:
        return self.name


def copy_of(file: str, directory: Path, change: Callable[[str], str] = lambda text: text) -> ModuleType:
    """The backend's module ``file``, changed, as a module of its own: Triton compiles its kernels anew."""
    folder = "gpu" if file == "chunk_tables" else "triton"
    spec = importlib.util.find_spec(f"{BACKENDS}.{folder}.{file}")
    assert spec is not None
    assert spec.origin is not None
    path = directory / f"{file}_copy.py"
    path.write_text(change(Path(spec.origin).read_text()))
    copied = importlib.util.spec_from_file_location(path.stem, path)
    assert copied is not None
    assert copied.loader is not None
    module = importlib.util.module_from_spec(copied)
    copied.loader.exec_module(module)
    _KEPT.append(module)
    return module


_KEPT: list[ModuleType] = []  # a kernel that dies asks the driver to unload it, and the executor's is gone by then


# -- checks ------------------------------------------------------------------------------------------------------------
TWO_BLOCKS, TAIL = 2048, 1500


def threshold_is_right(
    module: ModuleType, numel: int, t: float = 0.5, p: float = 3.0, out_dtype: torch.dtype = torch.float32
) -> None:
    w = torch.randn(numel, generator=torch.Generator().manual_seed(numel))
    threshold, out = torch.tensor(t), torch.full((numel,), torch.nan, dtype=out_dtype)
    module.threshold(w, threshold, p, out)
    assert oracle.ulp_error(out, oracle.threshold(w, threshold, p)) <= (2 if out_dtype == torch.float32 else 0.55)


def tail(module: ModuleType) -> None:
    threshold_is_right(module, TAIL)


def two_thresholds(module: ModuleType) -> None:
    threshold_is_right(module, TAIL, t=0.5)
    threshold_is_right(module, TAIL, t=1.5)


def rounding(module: ModuleType) -> None:
    threshold_is_right(module, TWO_BLOCKS, out_dtype=torch.bfloat16)


def gradient(module: ModuleType) -> None:
    w = torch.randn(TAIL, generator=torch.Generator().manual_seed(0))
    g, t, half = torch.ones(TAIL), torch.tensor(0.5), torch.tensor(0.5)
    out = torch.full_like(g, torch.nan)
    module.scale_pruned_grad(g, w, t, half, out)
    assert oracle.ulp_error(out, oracle.scaled_gradient(g, w, t, 0.5)) == 0


def count(module: ModuleType, weight: Tensor | None = None) -> None:
    """Several programs add to one number."""
    w = torch.randn(20_000, generator=torch.Generator().manual_seed(0)) if weight is None else weight
    t, counts = torch.tensor(0.5), torch.zeros(1, dtype=torch.int64)
    module.count_pruned([w], [t], counts)
    assert counts.item() == int(oracle.pruned(w, t).sum())


def count_copied(module: ModuleType) -> None:
    """Weights that are not dense are copied, and the copies must live until the launch."""
    count(module, torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0))[:, ::2])


def with_tables_of(module: ModuleType, weights: Callable[[], Iterator[Tensor]]) -> None:
    """Count each of ``weights``, with tables from ``module``, a copy of chunk_tables."""
    from feather_kernels.backends.triton import chunks
    from feather_kernels.backends.triton import count as count_module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "chunk_tables", module)
        for weight in weights():
            count(count_module, weight)


def misaligned(module: ModuleType) -> None:
    with_tables_of(module, lambda: iter([samples.LAYOUTS["misaligned"](torch.randn(20_000))]))


def two_weights(module: ModuleType) -> None:
    """One after the other; the first is freed when the second has its place."""

    def weights() -> Iterator[Tensor]:
        first = torch.randn(20_000)
        second = torch.randn(20_000)
        yield first
        first = torch.empty(0)
        yield second

    with_tables_of(module, weights)


def selection(
    module: ModuleType, weights: list[Tensor], ranks: Iterable[int], hint: Tensor | None = None, caps: Any = None
) -> None:
    """Both order statistics of one group, with the functions of the module in the place of the backend's."""
    from feather_kernels.backends.triton import select

    parts = [oracle.scores(w) for w in weights]
    with pytest.MonkeyPatch.context() as patch:
        for name in {"try_bracket", "count_digits", "scan_kernel", "smallest_above_kernel"} & vars(module).keys():
            patch.setattr(select, name, getattr(module, name))
        for rank in ranks:
            out, wanted = torch.full((1, 2), torch.nan), torch.tensor([rank])
            caps_tensor = None if caps is None else torch.tensor(caps)
            given = Selection(weights, [0] * len(weights), wanted, caps=caps_tensor, hint=hint)
            getattr(module, "magnitude_select", select.magnitude_select)(given, out)
            expected = oracle.order_statistics(parts, rank, caps)
            assert oracle.same_bits(out[0], expected), f"rank {rank}"


def bracketed(module: ModuleType) -> None:
    """Keys at chosen places of a bracket of two rows around 1, ties at its center among them."""
    places = [1, 2, 300, 511, 512, 512, 512, 700, 700, 1023, 1023]
    keys = torch.tensor(1.0).view(torch.int32) - 512 + torch.tensor(places, dtype=torch.int32)
    weights = [torch.cat([keys.view(torch.float32), torch.full((9,), -0.5), torch.full((5,), 2.0)])]
    selection(module, weights, range(8, 21), hint=torch.ones(1, 2))


def radix(module: ModuleType) -> None:
    weights = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (3000, 500)]
    selection(module, [*weights, torch.ones(40)], (0, 1000, 2400, 2440, 3538))


def capped(module: ModuleType) -> None:
    """Up to the rank where the first weight has lost as much as it may, and the second loses more."""
    weights = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in (3000, 500)]
    caps, scores = [500, 200], [oracle.scores(w).sort().values for w in weights]
    rank = caps[0] - 1 + int((scores[1] <= scores[0][caps[0] - 1]).sum())
    selection(module, weights, (0, rank - 200, rank, rank + 1), caps=caps)


def selection_copied(module: ModuleType) -> None:
    selection(module, [torch.randn(20_000, 4, generator=torch.Generator().manual_seed(0))[:, ::2]], [1000])


def histogram_copied(module: ModuleType) -> None:
    w, out = torch.randn(20_000, 4)[:, ::2], torch.empty(1, 256, dtype=torch.int64)
    module.magnitude_histogram(Histogram([w], [0], torch.zeros(1, dtype=torch.int64), 23, 8), out)
    assert out[0].equal(torch.bincount(oracle.scores(w).view(torch.int32) >> 23, minlength=256))


BUGS = [
    Bug(
        "store without mask",
        "elementwise",
        r"(threshold_value\(w, t, P\)\.to\(out_ptr\.dtype\.element_ty\)), mask=inside\)",
        r"\1)",
        tail,
        "OutOfBoundsError",
        r"threshold_kernel: program 1 .*`st\.global.*writes",
    ),
    Bug(
        "load without mask",
        "elementwise",
        r"g = tl\.load\(g_ptr \+ offsets, mask=inside, other=0\.0\)",
        "g = tl.load(g_ptr + offsets)",
        gradient,
        "OutOfBoundsError",
        r"scale_kernel: program 1 .*`ld\.global.*reads",
    ),
    Bug(
        "a tail of one element too many",
        "elementwise",
        r"inside = offsets < n\n(        w = )",
        r"inside = offsets <= n\n\1",
        tail,
        "OutOfBoundsError",
        r"threshold_kernel: program 1 ",
    ),
    Bug(
        "a tail of one element too few",
        "elementwise",
        r"inside = offsets < n\n(        w = )",
        r"inside = offsets < n - 1\n\1",
        tail,
        "AssertionError",
        "NaN in different places",
    ),
    Bug(
        "stale threshold",
        "elementwise",
        r"flat_w, t, flat_out, n, power",
        'flat_w, globals().setdefault("stale", t), flat_out, n, power',
        two_thresholds,
        "AssertionError",
    ),
    Bug(
        "bfloat16 by truncation",
        "elementwise",
        r"(threshold_value\(w, t, P\)\.to\(out_ptr\.dtype\.element_ty)\)\)",
        r'\1, fp_downcast_rounding="rtz"))',
        rounding,
        "AssertionError",
    ),
    Bug(
        "race between programs",
        "count",
        r"tl\.atomic_add\((counts[^,]*), (.*), sem=\"relaxed\"\)\n",
        r"tl.store(\1, tl.load(\1) + \2)\n",
        count,
        "DataRaceError",
        "count_kernel.*races with",
    ),
    Bug(
        "vectors at any address of a table",
        "chunk_tables",
        r"address % 16 == 0",
        "address % 4 == 0",
        misaligned,
        "MisalignedError",
        "count_kernel.*16-byte global access",
    ),
    Bug(
        "stale table",
        "chunk_tables",
        r"dtype, \*entries\)",
        "dtype, *(entry[1:] for entry in entries))",
        two_weights,
        "OutOfBoundsError",
        "count_kernel.*`ld\\.global.*reads",
    ),
    *(
        Bug(
            f"copies freed before the launch: {file}",
            file,
            r"(?m)(chunks\.make_tables\(.*?\))(,|:|$)",
            r"[made._replace(kept=[]) for made in \1]\2",
            check,
            "OutOfBoundsError",
            f"{kernel}.*`ld\\.global.*reads",
        )
        for file, check, kernel in (
            ("count", count_copied, "count_kernel"),
            ("select", selection_copied, "histogram_kernel"),
            ("radix", histogram_copied, "histogram_kernel"),
        )
    ),
    *(
        Bug(name, file, pattern, replacement, check, "AssertionError", r"rank \d+")
        for name, file, check, pattern, replacement in (
            ("a tie too many", "bracket", bracketed, r"wanted \+ 1 < at_most", "wanted + 1 <= at_most"),
            ("the hint's key counted twice", "bracket", bracketed, r" & \(place != center\)", ""),
            ("counts without their row", "bracket", bracketed, r"(counts \+ group \* BINS) \+ row \* ROW", r"\1"),
            ("the neighbour in the same row", "bracket", bracketed, r"tl\.minimum\(next_row, ROWS - 1\)", "row"),
            ("keys before the bracket forgotten", "bracket", bracketed, r"\(wanted >= before\) & ", ""),
            ("counts kept for the next digit", "radix", radix, r"tl\.store\(counts \+ .*", "pass"),
            ("the digit before", "radix", radix, r"\(total <= wanted\)", "(total < wanted)"),
            ("the value as its own neighbour", "radix", radix, r"key > bound", "key >= bound"),
            ("a row beyond its cap", "radix", capped, r"through < tl\.load\(caps", "through <= tl.load(caps"),
        )
    ),
]


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_a_planted_bug_is_caught(executor: Any, bug: Bug, tmp_path: Path) -> None:

    def plant(text: str) -> str:
        changed, times = re.subn(bug.pattern, bug.replacement, text)
        assert times == 1, f"the pattern stands {times} times in {bug.file}.py"
        return changed

    planted = copy_of(bug.file, tmp_path, plant)
    error = AssertionError if bug.error == "AssertionError" else getattr(errors, bug.error)
    with pytest.raises(error, match=bug.message):
        bug.check(planted)


@pytest.mark.parametrize(("file", "check"), sorted({(bug.file, bug.check) for bug in BUGS}, key=str))
def test_the_check_passes_without_the_bug(executor: Any, file: str, check: Check, tmp_path: Path) -> None:
    check(copy_of(file, tmp_path))


def test_a_missing_barrier_is_a_race(executor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum over the warps of a program goes through shared memory; some of Triton's barriers order nothing."""
    from tools.ptx_executor import DataRaceError, driver
    from tools.ptx_executor.execution import Program

    def races_without(removed: int) -> bool | None:
        """None where the compiled kernel has no such barrier."""
        changed = False

        def load(text: str, name: str) -> Program:
            nonlocal changed
            barriers = list(re.finditer(r"\bbar(?:rier)?\.sync[^;]*;", text))
            if removed not in range(len(barriers)):
                return Program(text, name)
            changed = True
            return Program(text[: barriers[removed].start()] + text[barriers[removed].end() :], name)

        monkeypatch.setattr(driver, "Program", load)
        try:
            count(copy_of("count", tmp_path))
        except DataRaceError as error:
            return "count_kernel" in str(error) and ".shared" in str(error)
        return False if changed else None

    assert races_without(-1) is None, "the unchanged kernel is right"
    found = [race for race in map(races_without, range(8)) if race is not None]
    assert any(found), f"{len(found)} barriers"
