"""Native part of the build: CMake (CMakeLists.txt) makes feather_kernels._cpu; all else is declared in pyproject.toml.

FEATHER_BUILD says what to build: ``auto`` (default) what this machine can, never failing an install; ``none``; ``cpu``;
``cuda``; ``all``: these fail with the compiler's words. A wheel without a module is pure (py3-none-any).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CHOICES = ("auto", "none", "cpu", "cuda", "all")
CPU = "feather_kernels._cpu"


def choice() -> str:
    """The value of FEATHER_BUILD; exits where it is none of CHOICES or names what this version cannot build."""
    value = os.environ.get("FEATHER_BUILD") or "auto"
    if value not in CHOICES:
        sys.exit(f"FEATHER_BUILD must be one of {', '.join(CHOICES)}, got {value!r}")
    if value in ("cuda", "all"):
        sys.exit(f"FEATHER_BUILD={value}: this version has no CUDA kernels of its own; use auto, none or cpu")
    return value


class BuildError(Exception):
    """A step of the native build failed; the message holds its output."""


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
            built = self.build_module(ext.name.rpartition(".")[2])
        except BuildError as error:
            if choice() != "auto":
                sys.exit(f"FEATHER_BUILD={choice()}: {ext.name} was not built.\n{error}")
            self.warn(f"{ext.name} was not built, the reference serves instead (FEATHER_BUILD=auto).\n{error}")
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(built, target)
        target.chmod(0o755)

    def build_module(self, name: str) -> Path:
        """Path of the module that CMake built."""
        try:
            import pybind11
        except ImportError as error:
            raise BuildError("pybind11 is not installed (a build without isolation needs it)") from error
        folder = Path(self.build_temp).resolve() / "cmake"
        output = folder / "module"
        definitions = {
            "CMAKE_BUILD_TYPE": "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": output,
            "FEATHER_PYTHON": "ON",
            "FEATHER_TESTS": "OFF",
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        if ninja := shutil.which("ninja"):  # its path is another one in each isolated build
            definitions["CMAKE_MAKE_PROGRAM"] = ninja
        shutil.rmtree(output, ignore_errors=True)
        run(
            [
                "cmake",
                "-S",
                ROOT,
                "-B",
                folder,
                "-G",
                "Ninja",
                *(f"-D{key}={value}" for key, value in definitions.items()),
            ]
        )
        run(["cmake", "--build", folder, "--target", name])
        return next(output.glob(f"{name}.*"))


class Wheel(bdist_wheel):
    """A wheel whose tag follows from what was built."""

    def run(self) -> None:
        """Build the modules first: without one the wheel is pure."""
        self.run_command("build_ext")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


def run(command: list[str | Path]) -> None:
    """Run a command; raises BuildError with its words."""
    words = [str(word) for word in command]
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    except OSError as error:
        raise BuildError(f"{words[0]}: {error}") from error
    print(done.stdout)
    if done.returncode != 0:
        raise BuildError(f"$ {' '.join(words)}\n{done.stdout}")


setup(
    ext_modules=[] if choice() == "none" else [Extension(CPU, sources=[])],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
