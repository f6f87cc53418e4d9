"""What a step sends: sums of a fixed size, and few. And what a program that shards nothing imports: nothing of it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from torch import nn

import feather_kernels as fk
from tests.distributed.models import make_model, optimizer_of, own_batch, shard, train_step
from tests.distributed.processes import Processes

BINS = (1 << 11, 2 << 10, 2 << 10)  # of the three digits; the last two are searched for two ranks


def bytes_of_a_step(width: int, layers: int, options: dict[str, Any]) -> list[int]:
    """Bytes of each collective that one step runs, whichever of torch's functions runs it."""
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    from torch.utils._python_dispatch import TorchDispatchMode

    class Collectives(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func.namespace in ("c10d", "_c10d_functional"):
                sent.append(sum(x.numel() * x.element_size() for x in args[0]))
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(*(nn.Linear(width, width) for _ in range(layers)))
    fully_shard(model)
    sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.9), **options)
    sent: list[int] = []
    with Collectives():
        sparsifier.step()
    assert dist.get_world_size() > 1
    return sent


@pytest.mark.parametrize("world", [2, 4])
def test_bytes_of_a_step_do_not_depend_on_the_model(processes: Processes, world: int) -> None:
    slots = 8 * world  # each process's step, in the first sum
    digits = [8 * bins for bins in BINS]
    bracket = [8 * (2 + 512), 8 * 2 * 256]  # counted around the last threshold
    searched = {
        (8, 2): [bracket[0] + slots, *digits],  # 128 weights, the next of which lies outside of the bracket
        (512, 4): [bracket[0] + slots, bracket[1]],
        (1024, 4): [bracket[0] + slots, bracket[1]],  # 4 million weights
    }
    for (width, layers), wanted in searched.items():
        assert processes.run(bytes_of_a_step, width, layers, {}, world=world) == [wanted] * world
    assert bracket[0] + sum(digits) + 8 * 1024 <= 64 << 10  # at most, also with 1,024 processes


def test_layers_with_thresholds_of_their_own_send_more_bytes_and_no_more_sums(processes: Processes) -> None:
    digits = [8 * bins for bins in BINS]
    for sent in processes.run(bytes_of_a_step, 8, 5, {"scope": "layer"}):
        assert sent == [5 * 8 * (2 + 512) + 16, *(5 * count for count in digits)]


def forwards_send_nothing_of_ours() -> list[int]:
    """The collectives of a forward and backward with stale weights, beside those of a dense model."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Collectives(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            counts[-1] += func.namespace in ("c10d", "_c10d_functional")
            return func(*args, **(kwargs or {}))

    counts = []
    for sparse in (False, True):
        model = make_model()
        if sparse:
            sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=4)
        shard(model)
        if sparse:
            sparsifier.step()
        optimizer = optimizer_of(model)
        counts.append(0)
        with Collectives():
            for step in range(2):
                train_step(model, optimizer, own_batch(step))
            model.eval()(own_batch(2)[0])
            if sparse:
                sparsifier.report(local=True)
                sparsifier.state_dict()
                sparsifier.detach()
    return counts


def test_only_what_is_documented_waits_for_others(processes: Processes) -> None:
    for dense, sparse in processes.run(forwards_send_nothing_of_ours):
        assert sparse == dense > 0


PLAIN = """
import sys
import torch
import feather_kernels as fk
model = torch.nn.Sequential(torch.nn.Linear(8, 8))
sparsifier = fk.Sparsifier(model, sparsity=0.5, total_steps=2)
model(torch.ones(2, 8)).sum().backward()
loaded = [name for name in ("torch.distributed.tensor", "torch.distributed.fsdp") if name in sys.modules]
sparsifier.step()  # imports torch's compiler, which imports these
sparsifier.assert_consistent()
sparsifier.report(local=True)
sparsifier.finalize()
print(loaded + [name for name in sys.modules if name.endswith(("distributed.selection", "distributed.collectives"))])
"""


@pytest.mark.parametrize("without", ["", "torch.distributed.is_available = lambda: False\n"], ids=["with", "without"])
def test_a_program_that_shards_nothing_imports_nothing_of_it(without: str) -> None:
    program = PLAIN.replace("import feather_kernels", f"{without}import feather_kernels")
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "[]\n", done.stderr
