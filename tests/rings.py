"""The rings that need a process of their own, and a line for each as the last lines of ``make test``.

Ring 1: the op tests on the Triton backend in Triton's interpreter. Ring 2: its kernels compiled for NVIDIA
architectures. Ring 3: the compiled PTX of the op tests' launches, executed on CPU tensors. See docs/gpu.md.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).parent
# test files, environment, and what is left out (-k) for time
RINGS = {
    1: (["test_threshold.py", "test_select.py", "test_schema.py"], {"TRITON_INTERPRET": "1"}, ""),
    2: (["test_triton_compiled.py"], {}, ""),
    3: (["test_threshold.py", "test_select.py"], {"FEATHER_PTX_ARCHITECTURE": "90"}, "not any_values and not 1.1"),
}


def main() -> int:
    """Run the rings and print their lines; 1 if any failed."""
    if importlib.util.find_spec("triton") is None:
        print("\n".join(f"ring {ring}: skipped (no triton)" for ring in RINGS))
        return 0
    lines, failed = [], False
    for ring, (files, variables, chosen) in RINGS.items():
        paths = [str(TESTS / file) for file in files]
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-k", chosen, *paths]
        done = subprocess.run(command, env={**os.environ, **variables}, capture_output=True, text=True, check=False)
        summary = re.search(r"(\d+ (?:passed|failed).*?) in ", done.stdout)
        lines.append(f"ring {ring}: {summary.group(1) if summary else 'no test ran'}")
        if done.returncode != 0:
            failed = True
            print(done.stdout, done.stderr)
    print("\n".join(lines))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
