"""What the executor's README says: its snippets run, its error appears, its list of opcodes is the table's."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tools.ptx_executor.instructions import registry

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
ROOT = Path(__file__).parents[3]
KERNEL, PTX = re.findall(r"^```python\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
ERROR, OPCODES = re.findall(r"^```text\n(.*?)^```", README, flags=re.DOTALL | re.MULTILINE)
needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


def run(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """A snippet as a file: Triton reads the source of a kernel."""
    path = folder / "snippet.py"
    path.write_text(code)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(ROOT)
    return subprocess.run([sys.executable, path], env=environment, capture_output=True, text=True, check=False)


def without_addresses(text: str) -> str:
    return re.sub(r"0x[0-9a-f]+", "ADDRESS", " ".join(text.split()))


@needs_triton
def test_the_kernel_runs_and_moves_the_bytes_that_the_page_says(tmp_path: Path) -> None:
    done = run(KERNEL, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"prints `{done.stdout.strip()}`" in README


@needs_triton
def test_the_error_of_a_store_without_its_mask(tmp_path: Path) -> None:
    broken, times = re.subn(r", mask=inside\)$", ")", KERNEL, flags=re.MULTILINE)
    assert times == 1
    done = run(broken, tmp_path)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1].removeprefix("tools.ptx_executor.errors.")
    assert without_addresses(last) == without_addresses(ERROR)


def test_a_few_instructions_without_triton(tmp_path: Path) -> None:
    done = run(PTX, tmp_path)
    assert done.stdout.strip() == PTX.strip().rpartition("# ")[2], done.stderr


def test_the_list_of_opcodes_is_that_of_the_table() -> None:
    assert OPCODES.split() == sorted({opcode for opcode, _ in registry.rows()})


def test_it_imports_neither_the_package_nor_its_tests() -> None:
    for path in (ROOT / "tools" / "ptx_executor").rglob("*.py"):
        assert not re.search(
            r"^\s*(from|import) (feather_kernels|tests|benchmarks)\b", path.read_text(), re.MULTILINE
        ), path
