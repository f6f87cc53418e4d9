"""Ring 3: bugs planted in this package's own kernels, one textual change each, and the check that catches each one.

A check compares an op with the oracle under the executor. It passes on an unchanged copy of the file.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import oracle
import pytest
import samples
import torch
from conftest import PTX_ARCHITECTURE
from torch import Tensor

pytestmark = pytest.mark.skipif(not PTX_ARCHITECTURE, reason="needs the executor of ring 3")

PACKAGE = "feather_kernels.backends.triton"
Check = Callable[[ModuleType], None]


@dataclass(frozen=True)
class Bug:
    """``pattern``, found once in ``file``, becomes ``replacement``; ``check`` then raises ``error``: ``message``."""

    name: str
    file: str
    pattern: str
    replacement: str
    check: Check
    error: str  # a class of ptx.errors, or AssertionError: wrong values
    message: str = r"assert .* <= |different places"

    def __str__(self) -> str:
        return self.name


def copy_of(file: str, directory: Path, change: Callable[[str], str] = lambda text: text) -> ModuleType:
    """The backend's module ``file``, changed, as a module of its own: Triton compiles its kernels anew."""
    spec = importlib.util.find_spec(f"{PACKAGE}.{file}")
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


def two_powers(module: ModuleType) -> None:
    threshold_is_right(module, TAIL, p=4.5)
    threshold_is_right(module, TAIL, p=1.1)


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


def count_misaligned(module: ModuleType) -> None:
    from ptx.driver import expose

    from feather_kernels.backends.triton import count as count_module

    w = samples.LAYOUTS["misaligned"](torch.randn(20_000))
    with pytest.MonkeyPatch.context() as patch, expose([w]):
        patch.setattr(count_module, "table", module)
        count(count_module, w)


BUGS = [
    Bug(
        "store without mask",
        "elementwise",
        r"(threshold_value\(w, t, P, WIDE\)\.to\(out_ptr\.dtype\.element_ty\)), mask=inside\)",
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
        r"flat_w, t, flat_out, n, P=power",
        "flat_w, _constants.setdefault((0.0, w.device), t), flat_out, n, P=power",
        two_thresholds,
        "AssertionError",
    ),
    Bug("stale power", "elementwise", r"key = \(p, device\)", "key = (0.0, device)", two_powers, "AssertionError"),
    Bug(
        "bfloat16 by truncation",
        "elementwise",
        r"(threshold_value\(w, t, P, WIDE\)\.to\(out_ptr\.dtype\.element_ty)\)\)",
        r'\1, fp_downcast_rounding="rtz"))',
        rounding,
        "AssertionError",
    ),
    Bug(
        "race between programs",
        "count",
        r"tl\.atomic_add\((counts[^,]*), (.*)\)\n",
        r"tl.store(\1, tl.load(\1) + \2)\n",
        count,
        "DataRaceError",
        "count_kernel.*races with",
    ),
    Bug(
        "vectors at any address of a table",
        "table",
        r"data_ptr\(\) % 16 == 0",
        "data_ptr() % 4 == 0",
        count_misaligned,
        "MisalignedError",
        "count_kernel.*16-byte global access",
    ),
]


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_a_planted_bug_is_caught(executor: Any, bug: Bug, tmp_path: Path) -> None:
    import ptx

    def plant(text: str) -> str:
        changed, times = re.subn(bug.pattern, bug.replacement, text)
        assert times == 1, f"the pattern stands {times} times in {bug.file}.py"
        return changed

    planted = copy_of(bug.file, tmp_path, plant)
    error = AssertionError if bug.error == "AssertionError" else getattr(ptx, bug.error)
    with pytest.raises(error, match=bug.message):
        bug.check(planted)


@pytest.mark.parametrize(("file", "check"), sorted({(bug.file, bug.check) for bug in BUGS}, key=str))
def test_the_check_passes_without_the_bug(executor: Any, file: str, check: Check, tmp_path: Path) -> None:
    check(copy_of(file, tmp_path))


def test_a_missing_barrier_is_a_race(executor: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum over the warps of a program goes through shared memory; some of Triton's barriers order nothing."""
    from ptx import DataRaceError, driver
    from ptx.execution import Program

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
