"""Runs one part of a report in this process: ``python -m feather_kernels.cli.gpu_report.run_part NAME ROWS ...``."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from feather_kernels.cli.gpu_report.parts import PARTS
from feather_kernels.cli.gpu_report.target import Target, gpu
from feather_kernels.errors import BackendUnavailableError

SKIPPED = "skipped"  # the key of the row that says why there are no others


def main(arguments: Sequence[str] | None = None, make_target: Callable[[str, bool], Target] = gpu) -> int:
    """Run a part and write each row at once as a line of JSON, so that a crash loses none of them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("name", choices=list(PARTS))
    parser.add_argument("rows", type=Path)
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args(arguments)
    target = make_target(options.device, options.quick)
    with options.rows.open("w") as file:
        try:
            for row in PARTS[options.name].rows(target):
                print(json.dumps(row, allow_nan=False), file=file, flush=True)
        except BackendUnavailableError as error:
            print(json.dumps({SKIPPED: " ".join(str(error).split())}), file=file)
    return 0


if __name__ == "__main__":
    sys.exit(main())
