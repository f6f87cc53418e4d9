"""``feather-kernels selftest``: from its options to a printed table, a JSON file and JUnit XML."""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

import torch

from feather_kernels._version import __version__
from feather_kernels.backends.registry import registry
from feather_kernels.cli.errors import InputError
from feather_kernels.cli.near_names import unknown_name
from feather_kernels.cli.selftest.checks import TESTS, Check, dtype_name, examine
from feather_kernels.dtypes import WEIGHT_DTYPES

if TYPE_CHECKING:
    import argparse


def run(options: argparse.Namespace) -> int:
    """Test the device that the options name; returns the exit code, as ``check_device`` does.

    Raises:
        InputError: there is no such device or backend, or a file cannot be written; nothing has been tested then.
    """
    name = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.empty(0, dtype=torch.float32, device=name).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise InputError(f"--device must be a device of this machine, such as cuda:0, got {name!r}: {error}") from error
    for backend in options.require:
        if backend not in registry.modules:
            raise unknown_name("--require", backend, registry.modules)
    files = _writable("--json", options.json), _writable("--junit", options.junit)
    return check_device(device, *files, options.require)


def check_device(
    device: torch.device,
    json_file: Path | None = None,
    junit_file: Path | None = None,
    required: Sequence[str] = (),
) -> int:
    """Test every backend that the device offers, print a table and write the files.

    Args:
        device: to test.
        json_file: to write, if any.
        junit_file: to write, if any.
        required: backends that must be able to run.

    Returns:
        The exit code: 1 if a check failed, nothing ran, or a ``required`` backend cannot run.
    """
    offered = registry.availability(device)
    offered |= {name: f"is not for {device.type} devices" for name in required if name not in offered}
    checks: list[Check] = []
    for backend, reason in offered.items():
        if junit_file is not None:  # if a check kills this process, the file tells which did not run
            junit_file.write_bytes(junit(offered, checks, required))
        print(f"{backend} on {device}: {reason or 'available'}", flush=True)
        if reason is None:
            for check in examine(backend, device):
                verdict = "passed" if check.passed else "FAILED"
                print(f"  {verdict}  {check.op:<20} {check.dtype:<9} {check.outcome}", flush=True)
                checks.append(check)
    failed, absent = sum(not check.passed for check in checks), [name for name in required if offered[name] is not None]
    print(f"{len(checks) - failed} passed, {failed} failed")
    for name in absent:
        print(f"FAILED: {name} is required and cannot run")
    if json_file is not None:
        json_file.write_text(json.dumps(_record(device, offered, checks), indent=1, allow_nan=False) + "\n")
    if junit_file is not None:
        junit_file.write_bytes(junit(offered, checks, required))
    return int(failed > 0 or not checks or bool(absent))


def junit(offered: dict[str, str | None], checks: Sequence[Check], required: Sequence[str] = ()) -> bytes:
    """JUnit XML: a suite for each backend, a case for each op and dtype. The names are the same on every machine.

    Args:
        offered: backends, each with the reason why it cannot run or None; with a reason, its cases are skipped.
        checks: of the backends that can run. A case without its check is an error.
        required: backends whose cases are errors, not skipped, if they cannot run.
    """
    done = {(check.backend, check.op, check.dtype): check for check in checks}
    root = ElementTree.Element("testsuites", name="feather-kernels selftest")
    for backend, reason in offered.items():
        suite = ElementTree.SubElement(root, "testsuite", name=f"selftest.{backend}")
        counts = dict.fromkeys(("failure", "error", "skipped"), 0)
        for op, dtype in product(TESTS, map(dtype_name, WEIGHT_DTYPES)):
            check = done.get((backend, op, dtype))
            name, seconds = f"{op.replace(' ', '_')}[{dtype}]", 0.0 if check is None else check.seconds
            attributes = {"classname": f"feather_kernels.selftest.{backend}", "name": name, "time": f"{seconds:.3f}"}
            case = ElementTree.SubElement(suite, "testcase", attributes)
            if reason is not None:
                _ending(case, "error" if backend in required else "skipped", reason, counts)
            elif check is None:
                _ending(case, "error", "the check did not run", counts)
            elif not check.passed:
                _ending(case, "failure", check.outcome, counts)
        totals = {"tests": len(suite), "failures": counts["failure"], "errors": counts["error"]}
        spent = sum(check.seconds for check in checks if check.backend == backend)
        for key, value in {**totals, "skipped": counts["skipped"], "time": f"{spent:.3f}"}.items():
            suite.set(key, str(value))
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="utf-8", xml_declaration=True) + b"\n"


def _ending(case: ElementTree.Element, kind: str, message: str, counts: dict[str, int]) -> None:
    counts[kind] += 1
    legal = re.sub(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]", "\ufffd", message)  # XML 1.0, 2.2
    ElementTree.SubElement(case, kind, message=legal)


def _writable(option: str, name: str | None) -> Path | None:
    """The file, or None without a name; raises InputError if it cannot be written."""
    if name is None:
        return None
    path = Path(name)
    try:
        path.open("a").close()
    except OSError as error:
        raise InputError(f"{option} must be a file that can be written, got {name!r}: {error.strerror}") from error
    return path


def _record(device: torch.device, offered: dict[str, str | None], checks: list[Check]) -> dict[str, object]:
    return {
        "feather_kernels": __version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "unavailable": {name: reason for name, reason in offered.items() if reason is not None},
        "checks": [check.record() for check in checks],
    }
