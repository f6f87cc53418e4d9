"""The native part of the build: runs CMake for the compiled modules. pyproject.toml declares everything else.

The environment variable FEATHER_BUILD chooses the modules:

- ``auto`` (default): feather_kernels._cpu, and feather_kernels._cuda if there is an nvcc. A module that cannot be built
  is left out with a line that says why; the install never fails.
- ``cpu``, ``cuda`` or ``all`` (both): the install fails with the compiler's message if a module cannot be built.
- ``none``: no module.

A wheel without a compiled module is pure (py3-none-any).
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU, CUDA = "feather_kernels._cpu", "feather_kernels._cuda"
CHOICES = {"auto": (CPU, CUDA), "none": (), "cpu": (CPU,), "cuda": (CUDA,), "all": (CPU, CUDA)}
FALLBACK = {CPU: "the reference serves CPU tensors", CUDA: "NVIDIA GPUs are served by Triton or the reference"}


def choice() -> str:
    """The value of FEATHER_BUILD; exits if it is none of CHOICES."""
    value = os.environ.get("FEATHER_BUILD") or "auto"
    if value not in CHOICES:
        sys.exit(f"FEATHER_BUILD must be one of {', '.join(CHOICES)}, got {value!r}")
    return value


def extensions() -> list[Extension]:
    """The modules to build; ``auto`` leaves out _cuda without trying if there is no nvcc."""
    names = [name for name in CHOICES[choice()] if name == CPU or choice() != "auto" or nvcc() is not None]
    return [Extension(name, sources=[]) for name in names]


def nvcc() -> str | None:
    """The CUDA compiler, or None: $CUDACXX, or nvcc from $CUDA_HOME, $CUDA_PATH, PATH or /usr/local/cuda, in order."""
    if named := os.environ.get("CUDACXX"):
        return named
    homes = [home for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    folders = [*(str(Path(home, "bin")) for home in homes), None, "/usr/local/cuda/bin"]  # None: PATH
    return next((found for folder in folders if (found := shutil.which("nvcc", path=folder))), None)


class BuildError(Exception):
    """A failed step of the native build: the reason in one line, and ``output``, all that the step printed."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


class CMakeBuild(build_ext):
    """Builds each module with CMake and Ninja; ``auto`` leaves out a module that fails and says why."""

    def build_extensions(self) -> None:
        """Build the modules and remove those that were left out from the distribution."""
        super().build_extensions()
        self.extensions = [ext for ext in self.extensions if Path(self.get_ext_fullpath(ext.name)).exists()]
        self.distribution.ext_modules = self.extensions or None

    def build_extension(self, ext: Extension) -> None:
        """Build one module and put it where setuptools expects it."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.unlink(missing_ok=True)
        try:
            built = self.build_module(ext.name)
        except BuildError as error:
            if choice() != "auto":
                sys.exit(f"FEATHER_BUILD={choice()}: {ext.name} was not built: {error}\n{error.output}".rstrip())
            self.warn(f"FEATHER_BUILD=auto: {ext.name} was not built ({FALLBACK[ext.name]}): {error}")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, target)
        target.chmod(0o755)

    def build_module(self, name: str) -> Path:
        """Build one module with CMake, in a folder of its own, so that a failure leaves the others alone; its path."""
        try:
            import pybind11
        except ImportError as error:
            raise BuildError("pybind11 is not installed (a build without isolation needs it)") from error
        target = name.rpartition(".")[2]
        folder = Path(self.build_temp).resolve() / f"cmake{target}"
        definitions = {
            "CMAKE_BUILD_TYPE": "Release",
            "FEATHER_PYTHON": "ON",
            "FEATHER_TESTS": "OFF",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        if name == CUDA:
            if (compiler := nvcc()) is None:
                raise BuildError("no nvcc: put the CUDA toolkit's on PATH, or set CUDA_HOME or CUDACXX")
            definitions |= {"FEATHER_CUDA": "ON", "FEATHER_NVCC": compiler}
        if ninja := shutil.which("ninja"):  # its path changes with each isolated build
            definitions["CMAKE_MAKE_PROGRAM"] = ninja
        for stale in folder.glob(f"{target}.*"):
            stale.unlink()
        given = [f"-D{key}={value}" for key, value in definitions.items()]
        run(["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *given])
        run(["cmake", "--build", folder, "--target", target])
        return next(folder.glob(f"{target}.*"))


class Wheel(bdist_wheel):
    """A wheel whose tag says whether it holds a compiled module."""

    def run(self) -> None:
        """Build the modules before the tag is chosen: without one the wheel is pure."""
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


def run(command: list[str | Path]) -> None:
    """Run a command and print its output; raises BuildError if it fails."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{words[0]}: {error}") from error
    print(done.stdout)
    if done.returncode != 0:
        raise BuildError(reason(done.stdout), f"$ {' '.join(words)}\n{done.stdout}")


def reason(output: str) -> str:
    """One line of a failed step's output: CMake's first error, else the first line with "error", else the last line."""
    if found := re.search(r"CMake Error[^\n]*:\n((?:[ \t]+\S[^\n]*\n|\n)+)", output):
        return " ".join(found[1].split())[:400]
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    return next((line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)), lines[-1])[:400]


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel})
