"""Builds csrc/cuda with nvcc: the shipped module, its objects and its PTX, kept in build/."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import pytest

from feather_kernels.backends import compiled_module
from tests.simulated_gpu.sanitized_source import BINDINGS, KERNELS, Change, digest, pybind11, uses

ROOT = Path(__file__).parents[2]
CSRC = ROOT / "csrc"
KEPT = ROOT / "build" / "executed_cuda"


def nvcc() -> str:
    """The CUDA compiler; skips the test where there is none."""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    found = shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")
    if found is None:
        pytest.skip("no nvcc")
    return found


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)


def configure(folder: Path, **options: str) -> subprocess.CompletedProcess[str]:
    """CMake for the CUDA module alone; skips the test where a tool is missing."""
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("no cmake or no ninja")
    options = {
        "FEATHER_CUDA": "ON",
        "FEATHER_PYTHON": "ON",
        "FEATHER_TESTS": "OFF",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": str(pybind11() / "share" / "cmake" / "pybind11"),
        **options,
    }
    given = [f"-D{key}={value}" for key, value in options.items()]
    return run("cmake", "-S", str(ROOT), "-B", str(folder), "-G", "Ninja", *given)


def shipped() -> Path:
    """Folder with the module, its objects and the build's log; made once for each state of the sources."""
    compiler = nvcc()
    folder = ROOT / "build" / f"cuda-{compiled_module.source_hash(ROOT, 'cuda')}"[:27]
    log = folder / "ptxas.log"
    with _alone(folder):
        if not log.exists():
            configured = configure(folder, FEATHER_NVCC=compiler, CMAKE_CUDA_FLAGS="-Xptxas=-v")
            assert configured.returncode == 0, configured.stderr
            built = run("cmake", "--build", folder, "--target", "_cuda", "-j2")
            assert built.returncode == 0, built.stdout + built.stderr
            log.write_text(built.stdout + built.stderr)
    return folder


# ---------------------------------------------------------------------------------------------- PTX


def relinked() -> Path:
    """The shipped objects, linked against the stand-in for the CUDA runtime."""
    folder = shipped() / "csrc" / "cuda" / "CMakeFiles"
    kernels = [folder / "feather_cuda.dir" / f"{Path(kernel).name}.o" for kernel in KERNELS]
    return _linked([*kernels, folder / "_cuda.dir" / f"{Path(BINDINGS).name}.o"])


def ptx(architecture: int, csrc: Path = CSRC, sources: Sequence[str] = KERNELS) -> list[Path]:
    """The PTX of each source for an architecture, as the shipped machine code was compiled from."""

    def compiled(source: str) -> Path:
        name = f"{Path(source).stem}-{architecture}-{digest(text_of(csrc), nvcc_version())}.ptx"
        return _made(
            KEPT / name, lambda to: [*_nvcc(csrc), "-ptx", f"-arch=compute_{architecture}", csrc / source, "-o", to]
        )

    with ThreadPoolExecutor(2) as workers:
        return list(workers.map(compiled, sources))


def changed(change: Change, architecture: int, folder: Path) -> tuple[Path, list[Path]]:
    """Module and PTX of the sources with a change in a kernel, in the code that launches it, or in the bindings.

    A change of a header leaves the objects of the host as they are: it must be in a kernel.
    """
    shutil.copytree(CSRC, folder / "csrc")
    csrc = folder / "csrc"
    change.apply(csrc)
    touched = [kernel for kernel in KERNELS if uses(csrc, kernel, change.path)]
    assert touched or change.path == BINDINGS, f"no kernel uses {change.path}"
    kept = [kernel for kernel in KERNELS if kernel not in touched]
    code = [*ptx(architecture, CSRC, kept), *ptx(architecture, csrc, touched)]
    if change.path not in (*KERNELS, BINDINGS):
        return relinked(), code
    made = shipped() / "csrc" / "cuda" / "CMakeFiles"
    objects = [made / "feather_cuda.dir" / f"{Path(kernel).name}.o" for kernel in kept]
    objects += [_host_object(csrc, kernel, architecture) for kernel in touched]
    bindings = _bindings(csrc) if change.path == BINDINGS else made / "_cuda.dir" / f"{Path(BINDINGS).name}.o"
    return _linked([*objects, bindings]), code


ORDERING = re.compile(r"\b(?:fence|membar)\b[.\w]*|\b(?:atom|red|ld|st)\b\S*\.(?:acquire|release|acq_rel|sc)\b\S*")
"""PTX that orders other accesses of memory; kernels that add up integers need none, as a launch ends with one."""


def text_of(csrc: Path) -> str:
    """The sources of the module, as one hash."""
    folders = (csrc / "cuda", csrc / "include")
    return digest(*(p.read_text() for folder in folders for p in sorted(folder.rglob("*")) if p.is_file()))


@lru_cache
def nvcc_version() -> str:
    return run(nvcc(), "--version").stdout


def _nvcc(csrc: Path) -> list[str | Path]:
    return [nvcc(), "-std=c++17", "-O3", f"-I{csrc}", f"-I{csrc / 'include'}"]


def _host_object(csrc: Path, source: str, architecture: int) -> Path:
    """An object without machine code: nothing but the code of the host is used."""
    target = KEPT / f"{Path(source).stem}-host-{digest(text_of(csrc), nvcc_version())}.o"
    code = f"-gencode=arch=compute_{architecture},code=compute_{architecture}"
    flags = [code, "-Xcompiler=-fPIC", "-Xcompiler=-fvisibility=hidden"]
    return _made(target, lambda to: [*_nvcc(csrc), *flags, "-c", csrc / source, "-o", to])


def _bindings(csrc: Path) -> Path:
    target = KEPT / f"bindings-{digest(text_of(csrc), sys.version)}.o"
    facts = [f'-DFEATHER_{name}="changed"' for name in ("VERSION", "SOURCE_HASH", "COMPILER", "ARCHITECTURES")]
    system = [f"-isystem{path}" for path in (pybind11() / "include", sysconfig.get_paths()["include"])]
    flags = ["-std=c++17", "-O0", "-fPIC", "-fvisibility=hidden", f"-I{csrc}", f"-I{csrc / 'include'}", *facts, *system]
    return _made(target, lambda to: ["g++", *flags, "-c", csrc / BINDINGS, "-o", to])


def _linked(objects: Sequence[Path]) -> Path:
    runtime_source = CSRC / "tests" / "cuda" / "cudart.cpp"
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-fvisibility=hidden"]
    name = f"cudart-{digest(runtime_source.read_text(), *flags)}.o"
    runtime = _made(KEPT / name, lambda to: ["g++", *flags, "-c", runtime_source, "-o", to])
    target = KEPT / f"module-{digest(*map(_hash, objects), runtime.name)}" / "_cuda.so"
    # no symbol may be left to be found in a runtime that torch has loaded
    return _made(target, lambda to: ["g++", "-shared", *objects, runtime, "-o", to])


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _made(target: Path, command: Callable[[Path], Sequence[str | Path]]) -> Path:
    """``target``, made by the command for an unfinished file unless it is there."""
    with _alone(target):
        if not target.exists():
            unfinished = target.with_name(f"unfinished-{target.name}")
            done = run(*command(unfinished))
            assert done.returncode == 0, done.stderr[:4000]
            unfinished.rename(target)
    return target


@contextmanager
def _alone(target: Path) -> Iterator[None]:
    """Other processes that want the same wait."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.with_name(f".{target.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
