"""Builds csrc/cuda as C++ for the CPU (csrc/tests/cuda/cuda_on_cpu.h), under sanitizers; keeps objects in build/."""

from __future__ import annotations

import hashlib
import importlib.util
import platform
import shutil
import subprocess
import sysconfig
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]
KEPT = ROOT / "build" / "sanitized_source"
KERNELS = ("cuda/count.cu", "cuda/elementwise.cu", "cuda/selection.cu")
TESTS = ("tests/cuda/main.cpp", "tests/cuda/test_elementwise.cpp", "tests/cuda/test_selection.cpp")
BINDINGS = "cuda/bindings.cpp"
COMMON = ("-std=c++17", "-DFEATHER_CUDA_ON_CPU", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas", "-fPIC")


class Build(NamedTuple):
    """Flags of a build; sanitizers make every fault end the program."""

    name: str
    flags: tuple[str, ...]


def _sanitized(kinds: str, *flags: str) -> tuple[str, ...]:
    return ("-O1", "-g", f"-fsanitize={kinds}", "-fno-sanitize-recover=all", "-DFEATHER_CUDA_THREADS=64", *flags)


# with a product and a sum fused, as nvcc does, where the machine can
_FUSED = ("-mfma", "-ffp-contract=fast") if platform.machine() in ("x86_64", "AMD64") else ("-ffp-contract=fast",)
MEMORY = Build("address and undefined behaviour", _sanitized("address,undefined"))
RACES = Build("threads", _sanitized("thread", "-DCUDA_ON_CPU_THREADS"))
SHIPPED = Build("shipped block size, fused arithmetic", ("-O1", *_FUSED))
MODULE = Build("module", ("-O1", "-DFEATHER_CUDA_THREADS=64"))


class Change(NamedTuple):
    """A textual change of a source under csrc/, which must apply exactly once."""

    path: str
    old: str
    new: str

    def apply(self, csrc: Path) -> None:
        """Make it in a copy of the sources."""
        path = csrc / self.path
        source = path.read_text()
        assert source.count(self.old) == 1, f"{self.path} must hold the text to change once: {self.old!r}"
        path.write_text(source.replace(self.old, self.new))


def compiler() -> str:
    """The C++ compiler; skips the test where there is none."""
    found = shutil.which("g++") or shutil.which("clang++")
    if found is None:
        pytest.skip("no g++ or clang++")
    return found


def pybind11() -> Path:
    """pybind11's folder; skips the test where it is not installed."""
    spec = importlib.util.find_spec("pybind11")
    if spec is None or spec.origin is None:
        pytest.skip("pybind11 is not installed")
    return Path(spec.origin).parent


def test_program(build: Build) -> Path:
    """The program of csrc/tests/cuda."""
    objects = _objects(build, ROOT / "csrc", [*KERNELS, *TESTS])
    return _link(build, objects, KEPT / f"tests-{digest(*map(str, objects))}")


def changed_program(build: Build, change: Change, folder: Path) -> Path:
    """The program with one kernel source changed; everything else as in ``test_program``."""
    shutil.copytree(ROOT / "csrc", folder / "csrc")
    change.apply(folder / "csrc")
    touched = [kernel for kernel in KERNELS if uses(folder / "csrc", kernel, change.path)]
    objects = _objects(build, ROOT / "csrc", [*(kernel for kernel in KERNELS if kernel not in touched), *TESTS])
    return _link(build, [*objects, *_objects(build, folder / "csrc", touched)], folder / "tests")


def module() -> Path:
    """feather_kernels._cuda with its kernels on the CPU; skips the test where pybind11 is missing."""
    facts = ("VERSION", "SOURCE_HASH", "COMPILER", "ARCHITECTURES")
    includes = (pybind11() / "include", Path(sysconfig.get_paths()["include"]))
    bindings = Build("module", (*MODULE.flags, *(f'-DFEATHER_{f}="on a CPU"' for f in facts)))
    bindings = Build("bindings", (*bindings.flags, *(f"-isystem{path}" for path in includes), "-fvisibility=hidden"))
    objects = [*_objects(MODULE, ROOT / "csrc", KERNELS), *_objects(bindings, ROOT / "csrc", [BINDINGS])]
    target = KEPT / f"module-{digest(*map(str, objects))}" / "_cuda.so"
    target.parent.mkdir(exist_ok=True)
    return _link(MODULE, objects, target, "-shared")


def _objects(build: Build, csrc: Path, sources: Sequence[str]) -> list[Path]:
    """Compiled sources, two at a time; those whose text and flags were seen before are taken from KEPT."""
    KEPT.mkdir(parents=True, exist_ok=True)
    folders = (csrc / "cuda", csrc / "include", csrc / "tests" / "cuda")
    text = digest(*(path.read_text() for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()))
    program = compiler()

    def compiled(source: str) -> Path:
        target = KEPT / f"{Path(source).stem}-{digest(text, program, *build.flags)}.o"
        if not target.exists():
            options = [*COMMON, *build.flags, f"-I{csrc}", f"-I{csrc / 'include'}"]
            unfinished = target.with_suffix(".part.o")
            _run(program, *options, "-x", "c++", "-c", str(csrc / source), "-o", str(unfinished))
            unfinished.rename(target)
        return target

    with ThreadPoolExecutor(2) as workers:
        return list(workers.map(compiled, sources))


def _link(build: Build, objects: Sequence[Path], target: Path, *options: str) -> Path:
    if not target.exists():
        flags = [flag for flag in build.flags if flag.startswith("-f")]
        _run(compiler(), *flags, *options, *map(str, objects), "-o", str(target), "-pthread")
    return target


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]


def uses(csrc: Path, source: str, header: str) -> bool:
    """Whether a source is a file (of csrc, as its path there) or includes it, itself or through other headers."""
    path = next(folder / source for folder in (csrc, csrc / "include") if (folder / source).exists())
    if path == csrc / header:
        return True
    included = [line.split('"')[1] for line in path.read_text().splitlines() if line.startswith('#include "')]
    return any(uses(csrc, name, header) for name in included)


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
