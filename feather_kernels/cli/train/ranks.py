"""The processes of a training run: one, or those that torchrun has started.

All take the same steps, each on its share of a batch; the first one prints and writes. What they say to each other goes
over gloo and from CPU to CPU, so that it waits for no GPU; the gradients go over NCCL on GPUs.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from feather_kernels.cli.errors import InputError
from feather_kernels.cli.interruption import Interruption

ANOTHER_FAILED = 1  # exit code of the ranks that end because another one has failed
VARIABLES = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # that torchrun sets, besides WORLD_SIZE
T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those of its run; by default it is the only one, and nothing is sent.

    If there are others, ``torch.distributed`` is set up, and all ranks must call the same methods in the same order,
    apart from ``share`` and ``device``.

    Attributes:
        rank: in [0, size).
        size: the number of processes.
        local_rank: the rank among the processes of this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this is the process that prints and writes."""
        return self.rank == 0

    def share(self, values: Tensor) -> Tensor:
        """The part of a batch for this rank; the sizes of all parts differ by at most one."""
        return values.tensor_split(self.size)[self.rank]

    def device(self, name: str) -> torch.device:
        """The device of this rank for the option ``--device``: of a machine's GPUs, each rank takes one.

        Raises:
            InputError: the ranks would share a GPU.
        """
        device = torch.device(name)
        if self.size == 1 or device.type == "cpu":
            return device
        if ":" in name:
            raise InputError(f"--device must be cpu or cuda under torchrun, where each rank takes a GPU, got {name}")
        if self.local_rank >= torch.cuda.device_count():
            raise InputError(
                f"--device cuda needs a GPU for each rank of a machine, got {torch.cuda.device_count()} GPUs for local "
                f"rank {self.local_rank}"
            )
        return torch.device("cuda", self.local_rank)

    def replicate(self, model: nn.Module, device: torch.device) -> nn.Module:
        """The model for forward and backward passes whose gradients are averaged over the ranks."""
        if self.size == 1:
            return model
        from torch.nn.parallel import DistributedDataParallel

        if device.type == "cuda":
            torch.cuda.set_device(device)
        devices = [device] if device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)

    def copy_from_first(self, tensors: Iterable[Tensor]) -> None:
        """Overwrite these tensors of all ranks by those of the first."""
        if self.size > 1:
            for tensor in tensors:
                torch.distributed.broadcast(tensor, 0)

    def add(self, numbers: Sequence[float]) -> list[float]:
        """The sums of these numbers over the ranks."""
        if self.size == 1:
            return list(numbers)
        total = torch.tensor(numbers, dtype=torch.float64, device="cpu")
        torch.distributed.all_reduce(total)
        return total.tolist()

    def any(self, value: bool) -> bool:
        """Whether the value is true on any rank."""
        return self.add([value])[0] > 0

    def wait(self) -> None:
        """Wait until all ranks have come to this call."""
        self.any(False)

    def from_first(self, make: Callable[[], T]) -> T:
        """What ``make()`` returns on the first rank, which alone calls it."""
        if self.size == 1:
            return make()
        content = [make() if self.is_first else None]
        torch.distributed.broadcast_object_list(content, 0, device=torch.device("cpu"))
        made: Any = content[0]
        return made

    def check_same(self, what: str, value: object) -> None:
        """Raise InputError on all ranks unless all have the same value."""
        if self.size == 1:
            return
        found: list[object] = [None] * self.size
        torch.distributed.all_gather_object(found, value)
        for rank, other in enumerate(found):
            if other != found[0]:
                raise InputError(
                    f"{what} must be the same on all ranks, got {found[0]} on rank 0 and {other} on rank {rank}"
                )

    @contextmanager
    def one_after_first_of_machine(self) -> Iterator[None]:
        """A context that the first rank of each machine leaves before the others enter, to fill a shared folder."""
        if self.local_rank > 0:
            self.wait()
        yield
        if self.local_rank == 0:
            self.wait()

    def interruption(self) -> Interruption:
        """The context that handles signals."""
        return Interruption() if self.size == 1 else _SharedInterruption(self)


class _SharedInterruption(Interruption):
    """A signal to one rank interrupts all of them at the same ``check``.

    Later signals are ignored, because Ctrl-C may arrive twice: from the terminal, and from torchrun, which kills
    whoever has not ended 30 seconds later.
    """

    def __init__(self, ranks: Ranks) -> None:
        super().__init__()
        self._ranks = ranks

    def check(self) -> None:
        self.noted = self._ranks.any(self.noted)
        super().check()

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.noted = True


@contextmanager
def launched_ranks() -> Iterator[Ranks]:
    """The processes that a launcher such as torchrun has started, connected while the context lasts.

    Only the first rank prints to stdout and shows warnings. If ranks fail, the first one to do so raises its error and
    the others end silently, because they fail only for the lack of it, or by the same mistake.

    Raises:
        InputError: there are several processes, but the environment does not say how they find each other.
        SystemExit: another rank has failed.
    """
    size = os.environ.get("WORLD_SIZE") or "1"
    if size == "1":
        yield Ranks()
        return
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        raise InputError(
            f"train with WORLD_SIZE={size} needs {', '.join(missing)} in the environment; start it with torchrun"
        )
    import torch.distributed as dist

    if not dist.is_available():
        raise InputError(f"train with WORLD_SIZE={size} needs a PyTorch that is built with torch.distributed")
    from torch.distributed.rendezvous import rendezvous

    store, rank, world = next(rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=world)
    ranks = Ranks(rank, world, int(os.environ["LOCAL_RANK"]))
    try:
        with ExitStack() as stack:
            if not ranks.is_first:
                stack.enter_context(redirect_stdout(stack.enter_context(Path(os.devnull).open("w"))))
                stack.enter_context(warnings.catch_warnings())
                warnings.simplefilter("ignore")
            yield ranks
    except BaseException:
        if _fails_first(store, rank):
            raise
        sys.exit(ANOTHER_FAILED)
    dist.destroy_process_group()


def _fails_first(store: Any, rank: int) -> bool:
    """Whether no other rank has failed before, as far as can be told."""
    try:
        return bool(store.compare_set("failed", "", str(rank)) == str(rank).encode())
    except RuntimeError:  # the store went with the rank that kept it
        return True
