"""What a process meets when it first touches a GPU, on stand-ins: a full memory, a broken device, moving weights."""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import subprocess
import sys
import types
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import feather_kernels as fk
from feather_kernels.backends import device_constants, reference
from feather_kernels.backends.gpu import chunk_tables, probe
from feather_kernels.backends.interface import Histogram, Selection
from feather_kernels.backends.registry import registry
from tests.conftest import CPU, ptx_executor
from tests.gpu.gpu_device import GPU, NAMES, gpu_backend, on_a_gpu
from tests.support.no_host_read import NoHostRead
from tests.support.oracle import same_bits

compiles = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")

NO_MEMORY = {
    "Triton": RuntimeError("Triton Error [CUDA]: out of memory"),
    "the runtime": RuntimeError("threshold: CUDA error cudaErrorMemoryAllocation: out of memory"),
    "the driver": RuntimeError("CUDA driver error: CUDA_ERROR_OUT_OF_MEMORY"),
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB."),
    "torch, late": getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory"),
}
OTHERS = (
    RuntimeError("Triton Error [CUDA]: device kernel image is invalid"),
    RuntimeError("out of resource: shared memory, Required: 300000, Hardware limit: 232448"),
    FileNotFoundError("no C compiler"),
)


# ------------------------------------------------------------------------------------------------------ probes


@pytest.fixture
def probed(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Exception]]:
    """A backend for CUDA whose probe launches on the CPU: the first launches raise what the list holds."""
    failures: list[Exception] = []
    module = types.ModuleType("probed_backend")

    def threshold(*arguments: Any) -> None:
        if failures:
            raise failures.pop(0)
        reference.threshold(*arguments)

    module.probe = lambda _: probe.probe_by_launch(threshold, CPU, str)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(registry.modules, "probed", module.__name__)
    monkeypatch.setitem(registry.order, "cuda", ("probed", "reference"))
    registry.reset()
    yield failures
    registry.reset()


@pytest.mark.parametrize("error", NO_MEMORY)
def test_a_gpu_that_is_full_when_the_module_loads_is_probed_again(error: str, probed: list[Exception]) -> None:
    probed.append(NO_MEMORY[error])
    with pytest.raises(type(NO_MEMORY[error]), match=r"(?i)out.of.memory"):
        registry.chosen_name(GPU)
    assert registry.chosen_name(GPU) == "probed"


@pytest.mark.parametrize("error", OTHERS, ids=lambda error: type(error).__name__)
def test_what_says_that_a_backend_cannot_run_is_remembered(error: Exception, probed: list[Exception]) -> None:
    probed.append(error)
    assert [registry.chosen_name(GPU) for _ in range(3)] == ["reference"] * 3
    assert registry.availability(GPU)["probed"] == f"its probe kernel failed: {error}"


@compiles
def test_triton_loads_a_module_again_that_did_not_load_at_first(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from feather_kernels.backends import triton

    with ptx_executor(90) as driver:
        load, loads = driver.utils.load_binary, []

        def load_when_there_is_room(*arguments: Any) -> Any:
            loads.append(arguments[0])
            if len(loads) == 1:
                raise RuntimeError("Triton Error [CUDA]: out of memory")
            return load(*arguments)

        monkeypatch.setattr(driver.utils, "load_binary", load_when_there_is_room)
        triton.elementwise.threshold_kernel.function.device_caches.clear()
        with pytest.raises(RuntimeError, match="out of memory"):
            probe.probe_by_launch(triton.threshold, CPU, triton.describe)
        assert probe.probe_by_launch(triton.threshold, CPU, triton.describe) is None
        assert loads == ["threshold_kernel"] * 2


class BrokenDevice:
    """A device that reports an illegal access of an earlier kernel at whatever waits for it."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.waited: list[Any] = []
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(torch.cuda, "synchronize", self.synchronize)

    def synchronize(self, device: Any) -> None:
        self.waited.append(device)
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


def no_launch(*_: Any) -> None:
    raise AssertionError("the probe was launched")


def test_an_error_of_an_earlier_kernel_is_not_taken_for_the_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("probed_backend")
    module.probe = lambda device: probe.probe_by_launch(no_launch, device, str)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(registry.modules, "probed", module.__name__)
    monkeypatch.setitem(registry.order, "cuda", ("probed", "reference"))
    registry.reset()
    device = BrokenDevice(monkeypatch)
    for count in (1, 2):
        with pytest.raises(RuntimeError, match=r"cuda:0 reports an error of an earlier .*illegal memory") as e:
            registry.backend_for(GPU)
        assert str(e.value.__cause__) == "CUDA error: an illegal memory access was encountered"
        assert device.waited == [GPU] * count
    assert not registry.is_probed("probed", GPU)
    registry.reset()


BROKEN = """
import torch
import feather_kernels as fk
w, t = torch.ones(8, device="cuda"), torch.tensor(0.5, device="cuda")
torch.arange(8, device="cuda")[torch.full((1,), 99, device="cuda")]  # fails later, on the device
fk.functional.threshold(w, t)
"""


@on_a_gpu
def test_a_users_own_failed_kernel_is_reported_as_an_earlier_error() -> None:
    done = subprocess.run([sys.executable, "-c", BROKEN], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "cuda:0 reports an error of an earlier operation, before feather_kernels launches" in done.stderr


# ------------------------------------------------------------------------------------- the reference on a GPU


class AddedTo(TorchDispatchMode):
    """How many additions the busiest address of each index_add_ to more than one group took, and how large it was."""

    def __init__(self) -> None:
        super().__init__()
        self.busiest: list[int] = []
        self.sizes: list[int] = []
        self.ops: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        self.ops.append(func.overloadpacket.__name__)
        if func.overloadpacket is torch.ops.aten.index_add_ and args[0].dim() == 1:  # of keys, not of groups
            self.busiest.append(int(args[2].bincount().max()))
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


KEYS = {
    "normal": lambda: torch.randn(600_001, generator=torch.Generator().manual_seed(0)),
    "float64": lambda: torch.randn(300_001, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "strided": lambda: torch.randn(600, 1001, generator=torch.Generator().manual_seed(0))[:, ::2],
    "ties": lambda: torch.full((300_000,), 0.5),
}


@pytest.mark.parametrize("kind", KEYS)
@pytest.mark.parametrize("capped", [False, True])
def test_the_reference_adds_few_keys_at_one_address_of_a_gpu(
    kind: str, capped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = [KEYS[kind](), torch.linspace(-2, 2, 999, dtype=KEYS[kind]().dtype)]
    rank = torch.tensor([sum(w.numel() for w in weights) * 9 // 10])
    caps = torch.tensor([w.numel() - 7 for w in weights]) if capped else None
    seen = []
    for atomically in (False, True):
        monkeypatch.setattr(reference, "_adds_atomically", lambda _, answer=atomically: answer)
        with AddedTo() as mode, NoHostRead():
            selection = Selection(weights, [0, 0], rank, caps=caps)
            out = torch.empty(1, 2, dtype=weights[0].dtype)
            reference.magnitude_select(selection, out)
        seen.append((out, mode))
    (plain, before), (spread, after) = seen
    assert same_bits(plain, spread)
    assert max(before.busiest) > reference.CHUNK * 0.9  # nearly all keys of a chunk are under another prefix
    assert max(after.busiest) <= reference.CHUNK // reference.MOST_COPIES
    assert max(after.sizes) * 8 <= 4 << 20
    assert not {"sort", "bincount", "nonzero", "masked_select"} & set(after.ops)


@pytest.mark.parametrize("bits", [1, 8, 11, 18])
def test_histograms_of_spread_bins_are_those_of_single_ones(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(n, generator=generator) for n in (70_000, 0, 333, 1)]
    prefix = torch.tensor([0x3F000000 >> bits + 5, 0x3F800000 >> bits + 5])
    counts = []
    for atomically in (False, True):
        monkeypatch.setattr(reference, "_adds_atomically", lambda _, answer=atomically: answer)
        out = torch.empty(2, 1 << bits, dtype=torch.int64)
        reference.magnitude_histogram(Histogram(weights, [0, 1, 0, 1], prefix, 5, bits), out)
        counts.append(out)
    assert counts[0].sum() > 0
    assert counts[0].equal(counts[1])


def test_the_reference_uploads_the_groups_of_capped_weights_once(monkeypatch: pytest.MonkeyPatch) -> None:
    uploads = count_uploads(monkeypatch)
    weights, caps = [torch.randn(50), torch.randn(60)], torch.tensor([40, 50])
    for _ in range(3):
        reference.magnitude_select(Selection(weights, [0, 0], torch.tensor([9]), caps=caps), torch.empty(1, 2))
    assert [upload.tolist() for upload in uploads] == [[0, 0]]


# ------------------------------------------------------------------------------------------------ moving weights


def count_uploads(patch: pytest.MonkeyPatch) -> list[torch.Tensor]:
    """What is uploaded from now on; nothing is left of before."""
    patch.setattr(device_constants, "_kept", OrderedDict())
    patch.setattr(chunk_tables, "_moves", OrderedDict())
    uploads, upload = [], device_constants._upload

    def counted(values: torch.Tensor, device: torch.device) -> Any:
        uploads.append(values)
        return upload(values, device)

    patch.setattr(device_constants, "_upload", counted)
    return uploads


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
        with AddedTo() as mode:
            chunk_tables.make_tables(weights, [0] * length, 64)
        counts.append(len(mode.ops))
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


# ---------------------------------------------------------------------------------- CUDA graphs of torch.compile


@pytest.mark.parametrize("power", [1.0, 2.0, 2.5, 3.0, float("inf")])
def test_elementwise_ops_keep_no_tensor(power: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the warm-up of a graph it would be allocated in the graph's own memory."""
    uploads = count_uploads(monkeypatch)
    w, t = torch.randn(500), torch.tensor(0.5)
    ops = torch.ops.feather_kernels
    before = {id(thing) for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)}
    ops.threshold(w, t, power)
    ops.scale_pruned_grad(w, w, t, t)
    gc.collect()
    assert {id(thing) for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor)} <= before
    assert uploads == []


def trained(device: torch.device, power: float, mode: str | None) -> tuple[list[float], list[torch.Tensor]]:
    """Losses of 12 steps, thresholds behind them; compiled with ``mode``."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 10)).to(device)
    sparsifier = fk.Sparsifier(model, sparsity=0.8, total_steps=12, power=power, grad_scale=0.5)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = model if mode is None else torch.compile(model, mode=mode, fullgraph=True)
    x, y = torch.randn(16, 32, device=device), torch.arange(16, device=device) % 10
    losses, thresholds = [], []
    for _ in range(12):
        loss = nn.functional.cross_entropy(run(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        sparsifier.step()
        losses.append(loss.item())
        thresholds.append(sparsifier.threshold.clone())
    return losses, thresholds


@on_a_gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("power", [3.0, 2.5])
def test_training_under_reduce_overhead_is_training_in_eager(power: float, name: str) -> None:
    """With a power that has a kernel and one that takes the reference, in the CUDA graphs that torch.compile makes."""
    with contextlib.nullcontext() if power == 2.5 else gpu_backend(name):  # a named backend refuses other powers
        losses, thresholds = trained(GPU, power, None)
        compiled_losses, compiled_thresholds = trained(GPU, power, "reduce-overhead")
    assert compiled_losses == pytest.approx(losses, rel=1e-3)
    torch.testing.assert_close(torch.stack(compiled_thresholds), torch.stack(thresholds), rtol=1e-3, atol=1e-6)
    assert losses[-1] < losses[0]


def test_different_weights_of_one_shape_are_no_weights_that_move(caplog: pytest.LogCaptureFixture) -> None:
    weights = [torch.randn(64, 64) for _ in range(24)]
    device_constants._kept.clear()
    chunk_tables._moves.clear()
    with caplog.at_level(logging.INFO, "feather_kernels"):
        made = [[chunk_tables.make_tables([w], [0], 1024)[0].chunks.data_ptr() for w in weights] for _ in range(3)]
    assert made[0] == made[1] == made[2], "each table is made once"
    assert not caplog.records
