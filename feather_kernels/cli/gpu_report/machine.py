"""The facts about the machine in a report, without the names of users, hosts and folders or the environment."""

from __future__ import annotations

import getpass
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from feather_kernels._version import __version__
from feather_kernels.cli import nvidia_driver
from feather_kernels.cli.doctor import version

CHECKOUT = Path(__file__).parents[3]
DISTRIBUTION = "feather_kernels"
FILES = "py|so|h|hpp|c|cpp|cu|cuh|ptx|json"  # endings of files whose names reveal nothing about a person
LEFT_OUT = "..."


def no_device() -> str | None:
    """Why this machine has no GPU to report on, or None if it has one."""
    if torch.version.hip is not None:
        return "torch is built for AMD's GPUs"
    if not torch.backends.cuda.is_built():
        return f"torch {torch.__version__} is built without CUDA"
    if torch.cuda.is_available():
        return None
    driver = nvidia_driver.installed()
    found = "no driver" if driver is None else f"the driver is {driver}, torch is built for CUDA {torch.version.cuda}"
    return f"torch finds none ({found})"


def facts(device: torch.device) -> dict[str, str]:
    """The GPU, and the versions of the driver and of all software above it."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "gpu": properties.name,
        "compute capability": f"{properties.major}.{properties.minor}",
        "memory": f"{properties.total_memory / 2**30:.1f} GiB",
        "driver": str(nvidia_driver.installed() or "unknown"),
        **versions(),
    }


def versions() -> dict[str, str]:
    """The versions of torch, CUDA, Triton, Python and the package, and the operating system."""
    return {
        "CUDA": torch.version.cuda or "none",
        "torch": torch.__version__,
        "triton": version("triton"),
        "python": platform.python_version(),
        "system": platform.system(),
        "feather_kernels": f"{__version__} {commit()}".strip(),
    }


def commit() -> str:
    """The commit of the checkout, with -dirty if files have changed, or the one that pip installed; "" if unknown."""
    if not (CHECKOUT / ".git").exists():
        return _installed_commit()
    command = ["git", "describe", "--always", "--dirty", "--abbrev=10", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=CHECKOUT)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return done.stdout.strip()


def _installed_commit() -> str:
    """The commit that ``pip install git+https://...`` recorded."""
    try:
        recorded = importlib.metadata.distribution(DISTRIBUTION).read_text("direct_url.json")
    except importlib.metadata.PackageNotFoundError:
        return ""
    return str(json.loads(recorded or "{}").get("vcs_info", {}).get("commit_id", ""))[:10]


_BEFORE = r"(?:(?<=-I)|(?<=-L)|(?<=://)|(?<![\w./%]))"  # an absolute path


def anonymous(text: str) -> str:
    """Remove folders and the names of the user and the host from a text; names of source files stay."""
    folders = {str(Path.home()), str(Path.cwd()), sys.prefix, sys.base_prefix, tempfile.gettempdir(), str(CHECKOUT)}
    for folder in sorted(folders - {"/"}, key=len, reverse=True):
        text = text.replace(folder, "/" + LEFT_OUT)  # first, because they may contain spaces
    text = re.sub(r"(['\"])/[^'\"]* [^'\"]*\1", rf"\1{LEFT_OUT}\1", text)  # quoted, with spaces
    text = re.sub(rf"{_BEFORE}/(?:[^\s:'\"(),;<>]*/)?([^\s/:'\"(),;<>]+\.(?:{FILES}))\b", rf"{LEFT_OUT}/\1", text)
    text = re.sub(rf"{_BEFORE}/[\w.~][^\s:'\"(),;<>]*", LEFT_OUT, text)
    for name in _names():
        text = re.sub(rf"(?<!\w){re.escape(name)}(?!\w)", LEFT_OUT, text)
    return text


def _names() -> list[str]:
    host = platform.node()
    try:
        user = getpass.getuser()
    except (KeyError, OSError, ImportError):  # in a container whose user has no name
        user = ""
    return [name for name in (host, host.partition(".")[0], user) if len(name) > 2]
