"""Native part of the build: CMake (CMakeLists.txt) makes the modules; all else is declared in pyproject.toml.

FEATHER_BUILD says what to build: ``none``; ``cpu`` (feather_kernels._cpu); ``cuda`` (feather_kernels._cuda); ``all``:
both. These fail with the compiler's words. ``auto`` (default) builds what this machine can and never fails an install:
_cpu, and _cuda where there is an nvcc; a line says what was left out and why. A wheel without a module is pure
(py3-none-any).
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
    """The value of FEATHER_BUILD; exits where it is none of CHOICES."""
    value = os.environ.get("FEATHER_BUILD") or "auto"
    if value not in CHOICES:
        sys.exit(f"FEATHER_BUILD must be one of {', '.join(CHOICES)}, got {value!r}")
    return value


def extensions() -> list[Extension]:
    """The modules to try; in auto none that needs a toolkit of which there is no trace."""
    names = [name for name in CHOICES[choice()] if name == CPU or choice() != "auto" or nvcc() is not None]
    return [Extension(name, sources=[]) for name in names]


def nvcc() -> str | None:
    """The CUDA compiler: $CUDACXX if set, else of $CUDA_HOME or $CUDA_PATH, on PATH, in /usr/local/cuda; or None."""
    if named := os.environ.get("CUDACXX"):
        return named
    homes = [home for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")) if home]
    folders = [*(str(Path(home, "bin")) for home in homes), None, "/usr/local/cuda/bin"]  # None: PATH
    return next((found for folder in folders if (found := shutil.which("nvcc", path=folder))), None)


class BuildError(Exception):
    """A step of the native build failed: why, in one line, and the output of the step."""

    def __init__(self, reason: str, output: str = "") -> None:
        super().__init__(reason)
        self.output = output


class CMakeBuild(build_ext):
    """Runs CMake and Ninja for each module; in auto, a module that cannot be built is left out with the reason."""

    def build_extensions(self) -> None:
        """Build the modules, and drop from the distribution those that were left out."""
        super().build_extensions()
        self.extensions = [ext for ext in self.extensions if Path(self.get_ext_fullpath(ext.name)).exists()]
        self.distribution.ext_modules = self.extensions or None

    def build_extension(self, ext: Extension) -> None:
        """Configure and build one target, and put the module where setuptools expects it."""
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
        """Path of the module that CMake built. Each has a build folder of its own: a failure of one stops no other."""
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
        if ninja := shutil.which("ninja"):  # its path is another one in each isolated build
            definitions["CMAKE_MAKE_PROGRAM"] = ninja
        for stale in folder.glob(f"{target}.*"):
            stale.unlink()
        given = [f"-D{key}={value}" for key, value in definitions.items()]
        run(["cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", *given])
        run(["cmake", "--build", folder, "--target", target])
        return next(folder.glob(f"{target}.*"))


class Wheel(bdist_wheel):
    """A wheel whose tag follows from what was built."""

    def run(self) -> None:
        """Build the modules first: without one the wheel is pure."""
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


def run(command: list[str | Path]) -> None:
    """Run a command and print its output; raises BuildError with it."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{words[0]}: {error}") from error
    print(done.stdout)
    if done.returncode != 0:
        raise BuildError(reason(done.stdout), f"$ {' '.join(words)}\n{done.stdout}")


def reason(output: str) -> str:
    """One line out of a failed step's: CMake's first error message, else the first line with "error", else the last."""
    if found := re.search(r"CMake Error[^\n]*:\n((?:[ \t]+\S[^\n]*\n|\n)+)", output):
        return " ".join(found[1].split())[:400]
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    return next((line for line in lines if re.search(r"\berror\b", line, re.IGNORECASE)), lines[-1])[:400]


setup(ext_modules=extensions(), cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel})
