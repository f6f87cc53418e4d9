"""Processes that run a function as the ranks of a gloo group, kept from test to test: starting them takes seconds."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

TIMEOUT = 60.0  # seconds for one function; the collectives inside give up a little earlier
COLLECTIVE_TIMEOUT = 50.0


class Processes:
    """At most four processes; they start when a test needs them, and anew after one that hangs or is lost."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []
        self._folder = tempfile.TemporaryDirectory()
        self._groups = 0
        self._world = 0

    def run(
        self, function: Callable[..., Any], *args: Any, world: int = 2, timeout: float = COLLECTIVE_TIMEOUT
    ) -> list[Any]:
        """What ``function(*args)`` returns in each rank; AssertionError with the tracebacks of those that raise."""
        answers = self.answers(function, *args, world=world, timeout=timeout)
        failed = [f"rank {rank}:\n{answer}" for rank, (good, answer) in enumerate(answers) if not good]
        assert not failed, "\n".join(failed)
        return [answer for _, answer in answers]

    def answers(
        self, function: Callable[..., Any], *args: Any, world: int = 2, timeout: float = COLLECTIVE_TIMEOUT
    ) -> list[tuple[bool, Any]]:
        """Of each rank whether it returned, and what, or the traceback; ``timeout`` is that of collectives."""
        self._start(world)
        if self._world != world or timeout != COLLECTIVE_TIMEOUT:
            self._groups += 1  # a new group needs a new file
        self._world = world if timeout == COLLECTIVE_TIMEOUT else 0
        group = (f"file://{self._folder.name}/{self._groups}", world, timeout)
        for rank in range(world):
            self._workers[rank][1].send((function.__module__, function.__qualname__, args, rank, group))
        deadline = time.monotonic() + TIMEOUT
        answers = [self._answer(rank, deadline) for rank in range(world)]
        if not all(good for good, _ in answers):
            self.stop()  # their group may be out of step
        return answers

    def stop(self) -> None:
        for process, connection in self._workers:
            process.kill()
            process.join()
            connection.close()
        self._workers, self._world = [], 0

    def _start(self, count: int) -> None:
        context = multiprocessing.get_context("forkserver")  # imports torch once for all
        context.set_forkserver_preload(["torch.distributed.fsdp", "torch.distributed.checkpoint", "feather_kernels"])
        os.environ.update(OMP_NUM_THREADS="1", GLOO_SOCKET_IFNAME="lo")  # for the processes; this one has its threads
        while len(self._workers) < count:
            own, other = context.Pipe()
            process = context.Process(target=_serve, args=(other,), daemon=True)
            process.start()
            other.close()
            self._workers.append((process, own))

    def _answer(self, rank: int, deadline: float) -> tuple[bool, Any]:
        connection = self._workers[rank][1]
        try:
            if connection.poll(max(0.0, deadline - time.monotonic())):
                return connection.recv()
        except (EOFError, ConnectionResetError):
            return False, "the process ended"
        return False, f"no answer within {TIMEOUT} seconds"


def _serve(connection: Connection) -> None:
    import torch

    torch.set_num_threads(1)
    opened = None
    while True:
        try:
            module, name, args, rank, group = connection.recv()
        except EOFError:
            return
        try:
            if opened != group:
                _open(rank, *group)
                opened = group
            function: Any = importlib.import_module(module)
            for part in name.split("."):
                function = getattr(function, part)
            torch.manual_seed(0)
            answer = True, function(*args)
        except BaseException:
            answer = False, traceback.format_exc()
        connection.send(answer)


def _open(rank: int, address: str, world: int, timeout: float) -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=address, rank=rank, world_size=world, timeout=timedelta(seconds=timeout)
    )
