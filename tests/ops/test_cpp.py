"""The C++ backend beside what every backend must do: instruction sets, threads, layouts, modules that are bad."""

from __future__ import annotations

import math
import os
import re
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import feather_kernels as fk
from feather_kernels.backends import compiled_module, cpp, reference
from feather_kernels.backends.registry import registry
from tests.support import oracle, samples

ops = torch.ops.feather_kernels
CPU = torch.device("cpu")
ROOT = Path(__file__).parents[2]
BUILT = registry.availability(CPU).get("cpp", "unknown") is None
needs_module = pytest.mark.skipif(not BUILT, reason="feather_kernels._cpu is not built here")


@pytest.fixture
def each_instruction_set() -> Iterator[list[str]]:
    """Names of the instruction sets of this machine; the one in use is put back afterwards."""
    before = cpp._cpu.instruction_set()
    yield cpp._cpu.available_instruction_sets()
    cpp._cpu.use_instruction_set(before)


def results(weights: list[torch.Tensor], t: float) -> list[torch.Tensor]:
    """Every op over weights of one compute dtype."""
    threshold, scale = (samples.scalar(v, weights[0].dtype, CPU) for v in (t, 0.3))
    count = sum(w.numel() for w in weights)
    found = [ops.threshold(w, threshold, p) for w in weights for p in samples.POWERS]
    found += [ops.scale_pruned_grad(w, w, threshold, scale) for w in weights]
    found.append(ops.count_pruned(weights, [threshold] * len(weights)))
    for rank in (0, count // 3, count - 1):
        found.append(ops.magnitude_select(weights, [0] * len(weights), torch.tensor([rank])))
    found.append(ops.magnitude_histogram(weights, [0] * len(weights), torch.tensor([0]), 20, 11))
    return found


@needs_module
@pytest.mark.parametrize("dtype", samples.DTYPES, ids=str)
def test_every_instruction_set_and_thread_count_gives_the_same_bits(
    each_instruction_set: list[str], dtype: torch.dtype
) -> None:
    """But for p = 3 on x86-64's baseline, whose bits are its own: it has no fused multiply-add."""
    torch.manual_seed(5)
    weights = [torch.randn(70_001).to(dtype), torch.randn(3, 5).to(dtype).t(), torch.empty(0, dtype=dtype)]
    expected: dict[bool, list[torch.Tensor]] = {}
    for name in each_instruction_set:
        cpp._cpu.use_instruction_set(name)
        assert cpp._cpu.instruction_set() == name
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            try:
                with fk.use_backend("cpp"):
                    found = results(weights, 0.7)
            finally:
                torch.set_num_threads(1)
            same = expected.setdefault(name == "baseline", found)
            assert all(oracle.same_bits(a, b) for a, b in zip(found, same, strict=True)), f"{name}, {threads}"
    for index, (baseline, fused) in enumerate(zip(*expected.values(), strict=True) if len(expected) == 2 else ()):
        if index < len(weights) * len(samples.POWERS) and samples.POWERS[index % len(samples.POWERS)] == 3:
            assert oracle.ulp_error(baseline, oracle.long_double(fused)) <= 2
        else:
            assert oracle.same_bits(baseline, fused)


@needs_module
def test_cpu_tensors_take_it_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(registry.ENVIRONMENT_VARIABLE, raising=False)
    assert registry.backend_for(CPU) is cpp


@needs_module
def test_dense_layouts_are_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels get the addresses of the tensors themselves."""
    addresses: list[int] = []
    real = cpp._cpu

    def threshold(w: int, w_dtype: int, out: int, *rest: object) -> None:
        addresses.extend((w, out))
        real.threshold(w, w_dtype, out, *rest)

    w = torch.randn(8, 6, 3, 3)
    t = torch.tensor(0.5)
    for dense in (w, w.contiguous(memory_format=torch.channels_last), w.permute(3, 1, 0, 2)):
        out = torch.empty_like(dense)
        with fk.use_backend("cpp"), monkeypatch.context() as patch:
            patch.setattr(cpp, "_cpu", types.SimpleNamespace(threshold=threshold))
            ops.threshold.out(dense, t, 3.0, out=out)
        assert addresses[-2:] == [dense.data_ptr(), out.data_ptr()]
        reference_out = torch.empty_like(dense)
        reference.threshold(dense, t, 3.0, reference_out)
        assert torch.allclose(out, reference_out, rtol=1e-6)


@needs_module
def test_weights_resized_between_calls() -> None:
    w = torch.randn(100)
    t, rank = torch.tensor(0.5), torch.tensor([10])
    with fk.use_backend("cpp"):
        first = ops.magnitude_select([w], [0], rank)
        for size in (7, 200_000, 0, 50):
            w.resize_(size).normal_()
            hinted = ops.magnitude_select([w], [0], rank, hint=first)
            assert oracle.same_bits(hinted[0], oracle.order_statistics([oracle.scores(w)], 10))
            assert ops.threshold(w, t, math.inf).count_nonzero() == (w.abs() > 0.5).sum()


@needs_module
def test_cpp_errors_are_python_exceptions() -> None:
    w = torch.ones(4)
    address = w.data_ptr()
    with pytest.raises(ValueError, match=r"power must be 1, 2, 3 or inf, got 2\.5"):
        cpp._cpu.threshold(address, 2, address, 2, 4, address, 2.5, 1)
    with pytest.raises(ValueError, match=r"dtype code must be in \[0, 4\), got 9"):
        cpp._cpu.threshold(address, 9, address, 2, 4, address, 3.0, 1)
    with pytest.raises(ValueError, match=r"instruction set must be one of .*got mmx"):
        cpp._cpu.use_instruction_set("mmx")


@needs_module
def test_a_forked_child_runs_on_one_thread() -> None:
    """OpenMP's threads do not survive a fork; a child that waited for them would hang."""
    code = """
import os, torch
from feather_kernels.backends.registry import registry
w, t = torch.randn(300_000), torch.tensor(0.5)
torch.set_num_threads(4)
expected = torch.ops.feather_kernels.threshold(w, t, 3.0)
child = os.fork()
if child == 0:
    torch.set_num_threads(4)
    out = torch.empty_like(w)
    registry.backend_for(w.device).threshold(w, t, 3.0, out)
    os._exit(0 if bytes(out.numpy()) == bytes(expected.numpy()) else 1)
assert os.waitpid(child, 0)[1] == 0
"""
    environment = {**os.environ, registry.ENVIRONMENT_VARIABLE: "cpp"}
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120, env=environment)


@pytest.mark.slow
@needs_module
def test_more_than_2_to_the_31_elements() -> None:
    count = (1 << 31) + 70
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if pages < 3 * 2 * count:
        pytest.skip("needs 13 GB of free memory")
    w = torch.full((count,), 0.5, dtype=torch.bfloat16)
    w[-3:] = 2.0
    t = torch.tensor(1.0)
    with fk.use_backend("cpp"):
        assert ops.count_pruned([w], [t]).item() == count - 3
        values = ops.magnitude_select([w], [0], torch.tensor([count - 4]))
        assert values.tolist() == [[0.5, 2.0]]
        ops.threshold.out(w, t, math.inf, out=w)
    assert w.count_nonzero() == 3
    assert w[-3:].tolist() == [2.0] * 3


# ---------------------------------------------------------------------------------------------- modules that are bad


@pytest.fixture
def unprobed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The backend as before its first use."""
    monkeypatch.setattr(cpp, "_cpu", None)
    monkeypatch.delenv(registry.ENVIRONMENT_VARIABLE, raising=False)
    registry.reset()
    yield
    registry.reset()


def module_with(**changes: str) -> types.ModuleType:
    module = types.ModuleType(cpp.MODULE)
    info = {"version": fk.__version__, "source_hash": compiled_module.source_hash(ROOT), **changes}
    module.build_info = lambda: info  # type: ignore[attr-defined]
    return module


def test_build_info_must_match() -> None:
    assert compiled_module.mismatch(module_with()) is None
    assert "was built for feather_kernels 0.0.1" in str(compiled_module.mismatch(module_with(version="0.0.1")))
    assert "was built from other sources (0000" in str(compiled_module.mismatch(module_with(source_hash="0" * 64)))
    assert compiled_module.mismatch(types.ModuleType("foreign")) == "is not a module of feather_kernels"


def test_a_wheel_has_no_sources_to_compare_with(tmp_path: Path) -> None:
    assert compiled_module.source_hash(tmp_path) is None


def test_the_hash_follows_every_source(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / "CMakeLists.txt", tmp_path)
    assert compiled_module.source_hash(tmp_path) == compiled_module.source_hash(ROOT)
    with (tmp_path / "csrc" / "include" / "feather" / "math.h").open("a") as file:
        file.write("\n")
    assert compiled_module.source_hash(tmp_path) != compiled_module.source_hash(ROOT)


@needs_module
@pytest.mark.usefixtures("unprobed")
def test_a_module_of_other_sources_is_refused_and_the_reference_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled_module, "source_hash", lambda *_: "f" * 64)
    with pytest.warns(
        RuntimeWarning, match=rf"other sources.*\(ffff.*{re.escape(sys.executable)} -m pip install -e \."
    ):
        assert registry.backend_for(CPU) is reference
    with fk.use_backend("cpp"), pytest.raises(fk.BackendUnavailableError, match="other sources"):
        ops.threshold(torch.ones(3), torch.tensor(0.5), 3.0)


@pytest.mark.usefixtures("unprobed")
def test_without_a_module_the_reference_serves_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpp, "MODULE", "feather_kernels._absent")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert registry.backend_for(CPU) is reference
    assert "was not built" in str(registry.availability(CPU)["cpp"])


@pytest.mark.usefixtures("unprobed")
@pytest.mark.parametrize("content", [b"", b"no library", b"\x7fELF" + bytes(60)], ids=["empty", "text", "header"])
def test_a_foreign_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    (tmp_path / "_foreign_cpu.so").write_bytes(content)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(cpp, "MODULE", "_foreign_cpu")
    with pytest.warns(RuntimeWarning, match="the C\\+\\+ backend is not used"):
        assert registry.backend_for(CPU) is reference
