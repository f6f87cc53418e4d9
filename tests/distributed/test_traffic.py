"""What a step sends: sums of a fixed size, and few. And what a program that shards nothing imports: nothing of it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import feather_kernels as fk
from feather_kernels.sparsify.distributed import collectives
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


class Step(NamedTuple):
    """What one step of a process runs: the bytes of each collective, the number of ops, and the threshold."""

    sent: list[int]
    ops: int
    threshold: float


def steps_beside_copies(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int], world: int) -> list[Step]:
    """Two steps of one process among ``world`` that have equal shards, so that a sum is a product with ``world``.

    The model has four weights of this shape, of which only this process's shard is in memory. The threshold is checked
    against that shard, of which the whole weights are copies.
    """
    dist = pytest.importorskip("torch.distributed")
    fake = pytest.importorskip("torch.testing._internal.distributed.fake_pg")
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.utils._python_dispatch import TorchDispatchMode

    class Collectives(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            ran.append(func)
            if func.namespace in ("c10d", "_c10d_functional"):
                assert func is torch.ops.c10d.allreduce_.default
                sent.extend(x.numel() * x.element_size() for x in args[0])
                for x in args[0]:
                    x.mul_(world)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(collectives, "_check_steps", lambda *_: None)  # of processes that do not exist
    dist.init_process_group("fake", store=fake.FakeStore(), rank=0, world_size=world)
    try:
        model = nn.Sequential(*(nn.Linear(*reversed(shape), bias=False, device="meta") for _ in range(4)))
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
        model.to_empty(device="cpu")
        shards: list[Tensor] = [parameter.to_local().detach() for parameter in model.parameters()]
        generator = torch.Generator().manual_seed(0)
        for shard in shards:
            shard.normal_(generator=generator)
        sparsifier = fk.Sparsifier(model, schedule=fk.ConstantSchedule(0.9))
        assert sparsifier.report(local=True).numel * world == 4 * shape[0] * shape[1]
        steps = []
        for _ in range(2):
            sent: list[int] = []
            ran: list[Any] = []
            with Collectives():
                sparsifier.step()
            steps.append(Step(sent, len(ran), sparsifier.threshold.item()))
        magnitudes = torch.cat([shard.flatten() for shard in shards]).abs().sort().values
        rank = int(0.9 * (world * len(magnitudes) - 1))
        assert {step.threshold for step in steps} == {magnitudes[rank // world].item()}
        return steps
    finally:
        dist.destroy_process_group()


def test_a_billion_weights_send_what_a_million_send(monkeypatch: pytest.MonkeyPatch) -> None:
    """On 1,024 processes, of which the billion leaves each one million."""
    million = steps_beside_copies(monkeypatch, (1024, 256), 1024)
    billion = steps_beside_copies(monkeypatch, (16_384, 16_384), 1024)
    slots = 8 * 1024
    first, later = billion
    assert first.sent == [8 * BINS[0] + slots, 8 * BINS[1], 8 * BINS[2]]  # a search
    assert later.sent == [8 * (2 + 512) + slots, 8 * 2 * 256]  # a bracket around the last threshold
    assert [(step.sent, step.ops) for step in million] == [(step.sent, step.ops) for step in billion]
    few = steps_beside_copies(monkeypatch, (1024, 256), 8)
    assert [sum(a.sent) - sum(b.sent) for a, b in zip(million, few, strict=True)] == [8 * (1024 - 8)] * 2


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
