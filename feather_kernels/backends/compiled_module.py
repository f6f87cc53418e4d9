"""Loads the compiled modules ``feather_kernels._cpu`` and ``_cuda``, after checks that they fit this package."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch

from feather_kernels._version import __version__

SOURCES = (".h", ".cuh", ".cpp", ".cu", ".txt")  # files that the hash of a module covers
CODES = {
    torch.float16: 0,
    torch.bfloat16: 1,
    torch.float32: 2,
    torch.float64: 3,
}  # of dtypes, as csrc/include/feather/dtype.h has them
REBUILD = f"rebuild it with `{sys.executable} -m pip install -e .` in its checkout"


def load(name: str, folder: str) -> ModuleType | None:
    """Return a compiled module, or None if it was not built.

    Args:
        name: of the module.
        folder: of its sources in csrc/.

    Raises:
        ImportError: it does not load, or was built from other sources; the message says what to do.
    """
    spec = importlib.util.find_spec(name)
    if spec is None:
        return None
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f"{spec.origin} cannot be loaded: {error}; {REBUILD}") from error
    reason = mismatch(module, folder)
    if reason is not None:
        raise ImportError(f"{spec.origin} {reason}; {REBUILD}")
    return module


def mismatch(module: ModuleType, folder: str = "cpu") -> str | None:
    """Return the reason why a loaded module does not belong to this package, or None."""
    try:
        info = module.build_info()
        version, sources = info["version"], info["source_hash"]
    except (AttributeError, KeyError, TypeError):
        return "is not a module of feather_kernels"
    if version != __version__:
        return f"was built for feather_kernels {version}, this is {__version__}"
    expected = source_hash(Path(__file__).parents[2], folder)
    if expected is not None and sources != expected:
        return f"was built from other sources ({sources[:12]}) than those beside the package ({expected[:12]})"
    return None


def source_hash(root: Path, folder: str = "cpu") -> str | None:
    """Return the hash of a module's sources as CMake computes it, or None if there are no sources.

    Args:
        root: the folder with CMakeLists.txt and csrc/.
        folder: of the module's sources in csrc/.
    """
    if not (root / "CMakeLists.txt").is_file() or not (root / "csrc" / folder).is_dir():
        return None
    paths = [root / "CMakeLists.txt", *(root / "csrc" / "include").rglob("*.h")]
    paths += [path for path in (root / "csrc" / folder).rglob("*") if path.suffix in SOURCES]
    lines = sorted((path.relative_to(root).as_posix(), path) for path in paths)
    hashes = "".join(f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for name, path in lines)
    return hashlib.sha256(hashes.encode()).hexdigest()
