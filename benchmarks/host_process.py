"""A process that times sparse layers and counts launches: ``python -m benchmarks.host_process PATH [--smoke]``.

PATH is ``cpu``, or ``stand-in`` for the GPU path over a stand-in for NVIDIA's driver. Requests come line by line on the
standard input, JSON lists of a method of ``Host`` and its arguments, answers as lines of JSON on the standard output.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from torch.autograd.profiler import profile

import feather_kernels as fk
from benchmarks import backends, fake_cuda_driver, networks
from feather_kernels.backends.registry import registry
from feather_kernels.cli.gpu_report.layers import POWER, SPARSITY, Layers, make_layers

LAYERS, SMOKE_LAYERS = 20, 2
RUNS = 50  # in one measurement
STAND_IN = "stand-in"
CPU = torch.device("cpu")
NO_KERNEL = {  # ops of torch that allocate, or look at memory in another way
    *("empty", "empty_like", "empty_strided", "new_empty", "resolve_conj", "resolve_neg", "detach", "alias", "to"),
    *("view", "reshape", "as_strided", "expand", "t", "transpose", "permute", "contiguous", "lift_fresh"),
    *("slice", "narrow", "select", "split", "split_with_sizes", "unbind", "squeeze", "unsqueeze", "promote_types"),
}


class Host:
    """What can be asked for. Layers are named by ``way`` (eager, compiled) and ``grad_scale`` (None: dense)."""

    def __init__(self, path: str, smoke: bool) -> None:
        self.smoke = smoke
        self.count = SMOKE_LAYERS if smoke else LAYERS
        self.backend = "triton" if path == STAND_IN else backends.available(CPU)[0]
        self.launches = fake_cuda_driver.activate() if path == STAND_IN else lambda: 0
        self.layers = cache(self._layers)

    def time_layers(self, way: str, grad_scale: float | None) -> float:
        """Seconds that forward and backward of one layer take."""
        return self._time(self.layers(way, grad_scale).both) / self.count

    def time_step(self, ours: bool) -> float:
        """Seconds of ``Sparsifier.step``, or of SGD's for the same weights."""
        return self._time(self._step(ours))

    def count_layers(self, way: str, grad_scale: float | None) -> dict[str, float]:
        """Launches for one layer, forward and backward: of Triton's kernels, and in eager of torch's."""
        counts = self._count(self.layers(way, grad_scale).both)
        if way == "compiled":
            del counts["torch_kernels"]  # inductor's are not told apart
        return {name: count / self.count for name, count in counts.items()}

    def count_step(self, ours: bool) -> dict[str, float]:
        """Launches of a step: of Triton's kernels and of torch's."""
        return self._count(self._step(ours))

    def wrong(self, way: str, grad_scale: float) -> str | None:
        """What is wrong in the outputs and gradients of sparse layers, or None."""
        sparse, dense = self.layers(way, grad_scale), self._layers("eager", None)
        pruned = networks.write_thresholded(dense.model, SPARSITY, POWER)
        outputs = sparse.both(), dense.both()
        if not torch.allclose(*outputs, rtol=1e-4, atol=1e-6):
            return "the outputs are not those of dense layers that hold P(w)"
        weights = zip(sparse.model.parameters(), dense.model.parameters(), pruned, strict=True)
        for index, (w, p, zero) in enumerate(weights):
            assert w.grad is not None
            assert p.grad is not None
            if not torch.allclose(w.grad, torch.where(zero, grad_scale * p.grad, p.grad), rtol=1e-3, atol=1e-6):
                return f"layer {index}: the weight's gradient is wrong"
        return None

    def _layers(self, way: str, grad_scale: float | None) -> Layers:
        compiler = "eager" if self.smoke else "inductor"
        return make_layers(self.count, CPU, grad_scale, compiler if way == "compiled" else None)

    def _step(self, ours: bool) -> Callable[[], object]:
        layers = self.layers("eager", 1.0)
        assert layers.sparsifier is not None
        return layers.sparsifier.step if ours else torch.optim.SGD(layers.model.parameters(), lr=0.0).step

    def _time(self, run: Callable[[], object]) -> float:
        runs = 1 if self.smoke else RUNS
        gc.collect()
        gc.disable()
        try:
            begin = time.perf_counter()
            for _ in range(runs):
                run()
            return (time.perf_counter() - begin) / runs
        finally:
            gc.enable()

    def _count(self, run: Callable[[], object]) -> dict[str, float]:
        run()
        before = self.launches()
        with profile(use_kineto=False) as profiler:  # Kineto looks for a GPU
            run()
        return {"triton_launches": self.launches() - before, "torch_kernels": torch_kernels(profiler.function_events)}


def torch_kernels(events: Sequence[Any]) -> int:
    """How many kernels torch's ops of a profile would launch on a GPU, as far as they are made of the same ops there.

    Ops that call others count for nothing themselves, unless those are ``NO_KERNEL``.
    """

    def kernels(event: Any) -> int:
        space, _, name = event.name.partition("::")
        return sum(map(kernels, event.cpu_children)) or int(space == "aten" and name not in NO_KERNEL)

    return sum(kernels(event) for event in events if event.cpu_parent is None)


def main() -> None:
    """Answer requests until there are no more."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="CUDA initialization")  # torch finds the stand-in, and does without
    host = Host(sys.argv[1], "--smoke" in sys.argv)
    # on the stand-in Triton takes CPU tensors; a probe could not find that out, as no kernel gives a result
    assumed = registry.assume_available("triton", CPU) if sys.argv[1] == STAND_IN else nullcontext()
    with assumed, fk.use_backend(host.backend):
        for line in sys.stdin:
            name, *arguments = json.loads(line)
            print(json.dumps(getattr(host, name)(*arguments)), flush=True)


if __name__ == "__main__":
    main()
