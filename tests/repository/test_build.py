"""Installing in scratch environments: with, without and with a failing compiler, editable, and from an sdist.

Build requirements come from the package index, torch does not. Takes minutes: `make check-build`, which CI runs.
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

ROOT = Path(__file__).parents[2]
FILES = ("CMakeLists.txt", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py")
FOLDERS = ("csrc", "feather_kernels")
NO_TOOLKIT = {"CUDACXX": "/nonexistent/nvcc"}
NO_COMPILER = {"CXX": "/nonexistent/c++", **NO_TOOLKIT}
HALF_COMPILER = """
case "$*" in *select.cpp*) echo "internal compiler error: out of luck" >&2; exit 4;; esac
exec c++ "$@"
"""
WRONG_TOOLKITS = {
    "garbage": ("echo three blind mice", "--dryrun does not say where it is"),
    "exit 1": ("exit 1", "--dryrun does not say where it is"),
    "old": (
        'case "$1" in --dryrun) echo "#$ TOP=/usr";; *) echo "Cuda compilation tools, release 11.7, V11.7.99";; esac',
        "needs CUDA 11.8 or later",
    ),
}
LOAD = """
import importlib.util, pathlib, sys
path = pathlib.Path(sys.argv[1])
spec = importlib.util.spec_from_file_location("feather_kernels." + path.name.partition(".")[0], path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(module.build_info()["version"])
"""
HAS_TOOLKIT = shutil.which("nvcc") is not None or shutil.which("nvcc", path="/usr/local/cuda/bin") is not None
needs_toolkit = pytest.mark.skipif(not HAS_TOOLKIT, reason="no nvcc")
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    words = [str(word) for word in command]
    hidden = ("FEATHER_BUILD", "PYTHONPATH", "CUDACXX", "CUDA_HOME", "CUDA_PATH")
    variables = {key: value for key, value in os.environ.items() if key not in hidden}
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


def modules_of(path: Path, folder: Path) -> dict[str, Path]:
    """The modules inside a wheel by name, unpacked."""
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith((".so", ".pyd"))]
        return {Path(name).name.partition(".")[0]: Path(archive.extract(name, folder)) for name in names}


def script(path: Path, body: str) -> str:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return str(path)


def test_a_wrong_choice_is_one_line() -> None:
    pytest.importorskip("setuptools", minversion="77")
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env={**os.environ, "FEATHER_BUILD": "gpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1] == "FEATHER_BUILD must be one of auto, none, cpu, cuda, all, got 'gpu'"
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@needs_compiler
def test_isolated_build_gives_a_module_that_loads(python: Path, sources: Path, tmp_path: Path) -> None:
    path, words = wheel(python, sources, **NO_TOOLKIT)
    assert path is not None, words
    assert "none-any" not in path.name
    assert loaded_versions(python, path, tmp_path) == {"_cpu": fk.__version__}


@pytest.mark.slow
@needs_compiler
@needs_toolkit
def test_all_makes_one_wheel_with_both_modules(python: Path, sources: Path, tmp_path: Path) -> None:
    path, words = wheel(python, sources, "--no-build-isolation", FEATHER_BUILD="all")
    assert path is not None, words
    assert loaded_versions(python, path, tmp_path) == {"_cpu": fk.__version__, "_cuda": fk.__version__}


def loaded_versions(python: Path, path: Path, folder: Path) -> dict[str, str]:
    """What the modules of a wheel say of their version, each loaded in a process without torch or a CUDA driver."""
    return {name: run(python, "-c", LOAD, module).stdout.strip() for name, module in modules_of(path, folder).items()}


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("toolkit", WRONG_TOOLKITS)
def test_a_wrong_toolkit_costs_the_cuda_module_and_one_line(
    python: Path, sources: Path, tmp_path: Path, toolkit: str
) -> None:
    body, reason = WRONG_TOOLKITS[toolkit]
    nvcc = script(tmp_path / "nvcc", body)
    refused, words = wheel(python, sources, "--no-build-isolation", CUDACXX=nvcc, FEATHER_BUILD="cuda")
    assert refused is None
    (line,) = lines_with("FEATHER_BUILD=cuda: feather_kernels._cuda was not built: ", words)
    assert reason in line

    path, words = wheel(python, sources, "--no-build-isolation", CUDACXX=nvcc)
    assert path is not None, words
    assert set(modules_of(path, tmp_path)) == {"_cpu"}, words
    (line,) = lines_with("FEATHER_BUILD=auto: feather_kernels._cuda was not built", words)
    assert reason in line
    assert nvcc in line


def lines_with(text: str, words: str) -> list[str]:
    return [line for line in words.splitlines() if text in line]


@pytest.mark.slow
@pytest.mark.parametrize("environment", [NO_COMPILER, {"FEATHER_BUILD": "none"}], ids=["no compiler", "none"])
def test_without_a_module_the_wheel_is_pure(python: Path, sources: Path, environment: dict[str, str]) -> None:
    path, words = wheel(python, sources, "--no-build-isolation", **environment)
    assert path is not None, words
    assert path.name.endswith("-py3-none-any.whl")
    assert not modules_of(path, sources.parent)


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize("choice", ["auto", "cpu"])
def test_a_compiler_that_fails_half_way(python: Path, sources: Path, tmp_path: Path, choice: str) -> None:
    compiler = script(tmp_path / "half-compiler", HALF_COMPILER)
    environment = {"CXX": compiler, "FEATHER_BUILD": choice, **NO_TOOLKIT}
    path, words = wheel(python, sources, "--no-build-isolation", **environment)
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
    done = run(*command, PATH=path, **NO_TOOLKIT)
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
