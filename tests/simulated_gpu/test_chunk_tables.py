"""Chunk tables, by which one launch handles a list of tensors: their rows, and their uploads when weights move."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from typing import Any

import pytest
import torch

import feather_kernels as fk
from feather_kernels.backends import device_constants
from feather_kernels.backends.gpu import chunk_tables
from tests.conftest import ptx_executor
from tests.gpu.gpu_device import GPU, NAMES, gpu_backend, on_a_gpu
from tests.support.recorded_operations import RecordedOperations
from tests.support.uploads import count_uploads

compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")


def moved(weights: list[torch.Tensor]) -> list[torch.Tensor]:
    return [weight.clone() for weight in weights]


def rows_one_by_one(weights: list[torch.Tensor], rows: list[int], chunk: int) -> list[list[int]]:
    """What a table must hold."""
    return [
        [w.data_ptr() + start * w.element_size(), min(chunk, w.numel() - start), w.data_ptr() % 16 == 0, row, index]
        for index, (w, row) in enumerate(zip(weights, rows, strict=True))
        for start in range(0, w.numel(), chunk)
    ]


def test_a_table_lists_every_chunk_of_every_tensor() -> None:
    weights = [torch.randn(n)[1:] if n == 300 else torch.randn(n) for n in (1, 64, 0, 65, 300, 128)]
    (table,) = chunk_tables.make_tables(weights, [3, 0, 1, 1, 2, 0], 64)
    assert table.chunks.dtype == torch.int64
    assert table.chunks.tolist() == rows_one_by_one(weights, [3, 0, 1, 1, 2, 0], 64)
    assert chunk_tables.make_tables([torch.empty(0)], [0], 64) == []


def test_a_table_of_many_tensors_takes_no_more_operations_than_one_of_few() -> None:
    counts = []
    for length in (2, 200):
        weights = [torch.randn(300) for _ in range(length)]
        with RecordedOperations() as mode:
            chunk_tables.make_tables(weights, [0] * length, 64)
        counts.append(len(mode.names))
    assert counts[0] == counts[1] <= 24


@compiles
def test_moving_weights_cost_one_upload_a_table_and_no_launch_more(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    weights, rank = [torch.randn(5000), torch.randn(77), torch.randn(300)], torch.tensor([4000])
    select = torch.ops.feather_kernels.magnitude_select
    hint = select(weights, [0, 0, 0], rank)
    uploads = count_uploads(monkeypatch)
    with ptx_executor(90) as driver, fk.use_backend("triton"):
        launches, places = [], [weights]  # kept, so that no address comes back
        for _ in range(5):
            before = len(driver.launches)
            weights = moved(weights)
            places.append(weights)
            assert select(weights, [0, 0, 0], rank, hint=hint).equal(hint)
            launches.append(len(driver.launches) - before)
        tables = len(uploads)
        select(weights, [0, 0, 0], rank, hint=hint)
    assert len(set(launches)) == 1
    assert tables == len(uploads) == 2 + 5  # rows and sizes once, the table of chunks for each place


def test_weights_that_move_at_every_step_are_logged_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "feather_kernels")
    count_uploads(monkeypatch)
    weights, others = [torch.randn(100), torch.randn(30)], [torch.randn(9)]
    places = []  # so that no address comes back
    for step in range(chunk_tables.MOVES * 3):
        places.append(moved(weights))
        chunk_tables.make_tables(places[-1], [0, 0], 64)
        chunk_tables.make_tables(others, [0], 64)
        assert len(caplog.records) == int(step + 1 >= chunk_tables.MOVES)
    message = caplog.records[0].getMessage()
    assert message.startswith(f"cpu: the weights' memory has moved {chunk_tables.MOVES} times in a row")
    assert len(device_constants._kept) <= device_constants.KEPT


def test_weights_that_move_now_and_then_are_not_logged(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "feather_kernels")
    count_uploads(monkeypatch)
    weights, places = [torch.randn(100), torch.randn(30)], []
    for _ in range(chunk_tables.MOVES * 2):
        places.append(moved(weights))
        for _ in range(chunk_tables.SOON + 1):
            chunk_tables.make_tables(places[-1], [0, 0], 64)
    assert caplog.records == []


class Stream:
    """A CUDA stream: what it was told to wait for."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.waited: list[str] = []

    def record_event(self) -> str:
        return f"end of the upload on {self.name}"

    def wait_event(self, event: str) -> None:
        self.waited.append(event)


class OnTheHost:
    """A tensor of the host, of which ``log`` keeps what was done with it."""

    def __init__(self, log: list[Any]) -> None:
        self.log = log

    def pin_memory(self) -> OnTheHost:
        self.log.append("pinned")
        return self

    def to(self, device: torch.device, non_blocking: bool = False) -> OnTheHost:
        self.log.append((device, non_blocking))
        return self

    def record_stream(self, stream: Stream) -> None:
        self.log.append(stream.name)


def test_an_upload_is_waited_for_by_other_streams_and_never_by_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_constants, "_kept", OrderedDict())
    monkeypatch.setattr(device_constants, "_captured", {})
    streams, log, capturing = [Stream("first")], [], [False]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: streams[-1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing[-1])
    wait = lambda *_: pytest.fail("the host waits")  # noqa: E731
    monkeypatch.setattr(torch.cuda, "synchronize", wait)

    def use() -> Any:
        return device_constants.device_constant("key", GPU, lambda: OnTheHost(log))  # type: ignore[arg-type,return-value]

    first = use()
    assert log == ["pinned", (GPU, True), "first"]
    assert use() is first
    assert streams[0].waited == []
    streams.append(Stream("second"))
    assert use() is first
    assert streams[1].waited == ["end of the upload on first"]
    assert log == ["pinned", (GPU, True), "first", "first", "second"]
    streams.append(Stream("captured"))
    capturing.append(True)
    assert use() is first
    assert streams[2].waited == []
    device_constants._kept.pop(("key", GPU), None)
    assert use() is first, "a graph holds its address"


@on_a_gpu
@pytest.mark.parametrize("name", [*NAMES, "reference"])
def test_moving_weights_on_two_streams_of_a_gpu(name: str) -> None:
    with gpu_backend(name):
        weights, rank = [torch.randn(n, device=GPU) for n in (90_000, 333)], torch.tensor([60_000], device=GPU)
        wanted = torch.cat(weights).abs().sort().values[60_000:60_002]
        caps = torch.tensor([w.numel() for w in weights], device=GPU)
        streams = [torch.cuda.Stream(), torch.cuda.Stream()]
        torch.cuda.synchronize()
        found = []
        for step in range(40):
            with torch.cuda.stream(streams[step % 2]):
                places = moved(weights) if step % 4 < 2 else weights
                found += [
                    torch.ops.feather_kernels.magnitude_select(places, [0, 0], rank),
                    torch.ops.feather_kernels.magnitude_select(places, [0, 0], rank, caps=caps),
                ]
        torch.cuda.synchronize()
        assert all(values[0].equal(wanted) for values in found)


def test_different_weights_of_one_shape_are_no_weights_that_move(caplog: pytest.LogCaptureFixture) -> None:
    weights = [torch.randn(64, 64) for _ in range(24)]
    device_constants._kept.clear()
    chunk_tables._moves.clear()
    with caplog.at_level(logging.INFO, "feather_kernels"):
        made = [[chunk_tables.make_tables([w], [0], 1024)[0].chunks.data_ptr() for w in weights] for _ in range(3)]
    assert made[0] == made[1] == made[2], "each table is made once"
    assert not caplog.records
