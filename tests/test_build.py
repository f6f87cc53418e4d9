"""Installing: with and without a compiler, one that fails half-way, editable, from an sdist; in scratch environments.

Build requirements come from the package index, torch does not. Long (minutes): `make check-build`, which CI runs.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import feather_kernels as fk

ROOT = Path(__file__).parent.parent
FILES = ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
FOLDERS = ("csrc", "feather_kernels")
NO_COMPILER = {"CXX": "/nonexistent/c++"}
HALF_COMPILER = """#!/bin/sh
case "$*" in *select.cpp*) echo "internal compiler error: out of luck" >&2; exit 4;; esac
exec c++ "$@"
"""
LOAD = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("feather_kernels._cpu", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.build_info()["version"], module.instruction_set())
"""
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    variables = {key: value for key, value in os.environ.items() if key not in ("FEATHER_BUILD", "PYTHONPATH")}
    return subprocess.run(words, env={**variables, **environment}, capture_output=True, text=True, timeout=900)


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A copy of what an sdist holds."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in FILES:
        shutil.copy(ROOT / name, folder)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    return folder


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scratch environment with the build requirements and without torch."""
    folder = tmp_path_factory.mktemp("environment")
    assert run(sys.executable, "-m", "venv", folder).returncode == 0
    done = run(
        folder / "bin" / "pip", "install", "-U", "pip", "setuptools>=77", "cmake>=3.22", "ninja", "pybind11>=2.12"
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "bin" / "python"


def wheel(python: Path, sources: Path, *options: str, **environment: str) -> tuple[Path | None, str]:
    """The wheel that pip builds, and pip's words."""
    output = sources.parent / "wheels"
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    done = run(
        python,
        "-m",
        "pip",
        "wheel",
        "-v",
        "--no-deps",
        *options,
        "-w",
        output,
        sources,
        **{"PATH": path, **environment},
    )
    return next(iter(output.glob("*.whl")), None), done.stdout + done.stderr


def module_of(path: Path, folder: Path) -> Path | None:
    """The module inside a wheel, unpacked."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.startswith("feather_kernels/_cpu")]
        return Path(archive.extract(names[0], folder)) if names else None


@pytest.mark.parametrize(
    ("value", "words"),
    [("gpu", "FEATHER_BUILD must be one of auto, none, cpu, cuda, all, got 'gpu'"), ("cuda", "no CUDA")],
)
def test_a_wrong_choice_is_one_line(value: str, words: str) -> None:
    pytest.importorskip("setuptools", minversion="77")
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "FEATHER_BUILD": value},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert words in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@needs_compiler
def test_isolated_build_gives_a_module_that_loads(python: Path, sources: Path, tmp_path: Path) -> None:
    path, words = wheel(python, sources)
    assert path is not None, words
    assert "none-any" not in path.name
    module = module_of(path, tmp_path)
    assert module is not None
    loaded = run(python, "-c", LOAD, module)
    assert loaded.stdout.split()[0] == fk.__version__, loaded.stderr


@pytest.mark.slow
@pytest.mark.parametrize("environment", [NO_COMPILER, {"FEATHER_BUILD": "none"}], ids=["no compiler", "none"])
def test_without_a_module_the_wheel_is_pure(python: Path, sources: Path, environment: dict[str, str]) -> None:
    path, words = wheel(python, sources, "--no-build-isolation", **environment)
    assert path is not None, words
    assert path.name.endswith("-py3-none-any.whl")
    assert module_of(path, sources.parent) is None


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("choice", ["auto", "cpu"])
def test_a_compiler_that_fails_half_way(python: Path, sources: Path, tmp_path: Path, choice: str) -> None:
    compiler = tmp_path / "half-compiler"
    compiler.write_text(HALF_COMPILER)
    compiler.chmod(0o755)
    path, words = wheel(python, sources, "--no-build-isolation", CXX=str(compiler), FEATHER_BUILD=choice)
    assert "internal compiler error: out of luck" in words
    if choice == "auto":
        assert path is not None
        assert path.name.endswith("-py3-none-any.whl")
    else:
        assert path is None
        assert "feather_kernels._cpu was not built" in words


@pytest.mark.slow
@needs_compiler
def test_editable_installs(python: Path, sources: Path) -> None:
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    command = (python, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "-e", sources)
    without = run(*command, PATH=path, **NO_COMPILER)
    assert without.returncode == 0, without.stderr
    assert not list((sources / "feather_kernels").glob("_cpu*"))
    done = run(*command, PATH=path)
    assert done.returncode == 0, done.stderr
    (module,) = (sources / "feather_kernels").glob("_cpu*")
    assert run(python, "-c", LOAD, module).returncode == 0


@pytest.mark.slow
@needs_compiler
def test_an_sdist_holds_what_the_build_needs(python: Path, sources: Path, tmp_path: Path) -> None:
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    code = "import setuptools.build_meta as backend, sys; print(backend.build_sdist(sys.argv[1]))"
    done = subprocess.run(
        [python, "-c", code, tmp_path], cwd=sources, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(tmp_path / "unpacked", filter="data")
    (unpacked,) = (tmp_path / "unpacked").iterdir()
    built, words = wheel(python, unpacked, "--no-build-isolation", FEATHER_BUILD="cpu")
    assert built is not None, words
