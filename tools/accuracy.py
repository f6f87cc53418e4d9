"""Prints the largest error in ulps per op, dtype and power, on every backend that runs here.

    python -m tools.accuracy

The inputs are the op tests' samples; the oracle computes in long double. ``triton, executed`` runs the compiled PTX on
the executor, with approximate instructions off by as much as PTX allows.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from contextlib import nullcontext

import torch

import feather_kernels as fk
from tests.conftest import BACKENDS, PTX_ARCHITECTURE, ptx_executor
from tests.support import oracle, samples

ops = torch.ops.feather_kernels
MEASURE = "--measure"
PROCESSES = {
    "reference": {},
    "triton, interpreted": {"TRITON_INTERPRET": "1"},
    "triton, executed": {"FEATHER_PTX_ARCHITECTURE": "90"},
}


def measure() -> dict[str, float]:
    """Largest error by op, dtype and power of this process's backend."""
    under_test = BACKENDS[0]
    found: dict[str, float] = {}
    with ptx_executor() if PTX_ARCHITECTURE else nullcontext(), fk.use_backend(under_test.name):
        for dtype in samples.DTYPES:
            if dtype == torch.bfloat16 and not under_test.exact_bfloat16:
                continue
            for value in samples.THRESHOLDS:
                t, scale = (samples.scalar(v, dtype, under_test.device) for v in (value, 0.3))
                weights = samples.boundary_weights(t, dtype)
                gradient = samples.gradients(weights, dtype)
                errors = {
                    f"threshold p={p}": oracle.ulp_error(ops.threshold(weights, t, p), oracle.threshold(weights, t, p))
                    for p in samples.POWERS
                }
                scaled = ops.scale_pruned_grad(gradient, weights, t, scale)
                errors["scale_pruned_grad"] = oracle.ulp_error(
                    scaled, oracle.scaled_gradient(gradient, weights, t, scale.item())
                )
                for name, error in errors.items():
                    row = f"{name} {str(dtype).removeprefix('torch.')}"
                    found[row] = max(found.get(row, 0.0), error)
    return found


def main() -> None:
    """Measure in a process for each backend and print the table."""
    results = {}
    for name, variables in PROCESSES.items():
        if name != "reference" and importlib.util.find_spec("triton") is None:
            print(f"{name}: skipped (no triton)")
            continue
        environment = {**os.environ, "PYTHONWARNINGS": "ignore", **variables}  # numpy's, in the interpreter
        command = [sys.executable, __file__, MEASURE]
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
        results[name] = json.loads(done.stdout)
    rows = sorted(set().union(*results.values()))
    width = max(map(len, rows))
    print("largest error in ulps".ljust(width), *(f"{name:>14}" for name in results))
    for row in rows:
        print(
            row.ljust(width),
            *(f"{result[row]:14.3f}" if row in result else f"{'-':>14}" for result in results.values()),
        )


if __name__ == "__main__":
    if MEASURE in sys.argv:
        print(json.dumps(measure()))
    else:
        main()
