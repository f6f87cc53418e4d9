"""Memory of a training step, counted op by op: what a sparse model holds more than the dense one, and when."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

import feather_kernels as fk
from benchmarks import backends, networks
from benchmarks.case import Case, Figure, Setting, Trial, Variant, accept
from benchmarks.live_bytes import LiveBytes
from benchmarks.networks import FOR_MEMORY, POWER, SMOKE, SMOKE_TRANSFORMER, Network, prunable

LIMIT = "dense"
RECOMPUTED = " recomputed"
FLOAT32, AUTOCAST, BFLOAT16 = PRECISIONS = ("float32", "autocast bfloat16", "bfloat16")
GRAD_SCALE = 0.5  # so that backward has work to do
RELATIVE_LOSS = 2e-2  # allowed difference from the oracle, in bfloat16
MORE = "_more"


class Held(NamedTuple):
    """Bytes held beyond weights and optimizer state, at moments of a training step."""

    after_forward: int
    peak_until_step: int  # in forward and backward
    after_backward: int
    peak_in_step: int  # in the optimizer's and the sparsifier's

    def figures(self, dense: Held, weights: int) -> dict[str, Figure]:
        """As figures: bytes, and bytes per prunable weight more than ``dense``."""
        own = {name: Figure(value, "B") for name, value in self._asdict().items()}
        pairs = zip(self._fields, self, dense, strict=True)
        return own | {name + MORE: Figure((mine - its) / weights, "B/weight") for name, mine, its in pairs}


SHOWN = ("after_forward", "peak_until_step", "peak_in_step")  # in tables


def operation(network: Network, precision: str) -> str:
    """The operation of a trial."""
    return f"{network.title}, {precision}"


@dataclass(frozen=True)
class Data:
    """A batch, the loss by the definition, and what the dense step holds."""

    network: Network
    precision: str
    images: Tensor
    labels: Tensor
    loss: float
    weights: int
    dense: Held

    def gate(self, weights: int, loss: float) -> str | None:
        """The loss, and the number of weights that take part."""
        if weights != self.weights:
            return f"{weights} prunable weights, not {self.weights}"
        right = abs(loss - self.loss) <= RELATIVE_LOSS * abs(self.loss)
        return None if right else f"loss {loss:.6g}, not {self.loss:.6g}"


def trials(setting: Setting) -> Iterator[Trial]:
    """Every network in every precision: dense, ours by default (P(w) kept), ours with recompute=True."""
    for network in (SMOKE, SMOKE_TRANSFORMER) if setting.smoke else FOR_MEMORY:
        for precision in PRECISIONS:
            variants: dict[str, Any] = {
                LIMIT: dense,
                **backends.ours(setting.device, partial(ours, recompute=None), True),
                **backends.ours(setting.device, partial(ours, recompute=True), True, RECOMPUTED),
            }
            prepare = partial(prepare_dense, network, precision, setting.device)
            name = operation(network, precision)
            yield Trial(name, "", network.sparsity, prepare, variants, LIMIT, rounds=0, grad=True)


def prepare_dense(network: Network, precision: str, device: torch.device) -> Data:
    """Measure the dense step; compute the loss of a dense model that holds P(w)."""
    images, labels = network.inputs(device)
    training = Training(network, precision, images, labels)
    (held, _), weights = training.measured_step(), sum(weight.numel() for weight in prunable(training.model))
    networks.write_thresholded(training.model, network.sparsity)
    loss = float(training.forward().detach())
    return Data(network, precision, images, labels, loss, weights, held)


class Training:
    """A model in a precision with AdamW on lists of tensors (``foreach``), as by default on GPUs.

    Its learning rate is 0: every step is the same.
    """

    def __init__(self, network: Network, precision: str, images: Tensor, labels: Tensor) -> None:
        dtype = torch.bfloat16 if precision == BFLOAT16 else torch.float32
        self.model = network.make().to(images.device, dtype).train()
        self.images, self.labels = images.to(dtype), labels
        self.autocast = precision == AUTOCAST
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.0, foreach=True)
        self.sparsifier: fk.Sparsifier | None = None

    def forward(self) -> Tensor:
        """The loss."""
        device = self.images.device.type
        context: AbstractContextManager = torch.autocast(device, torch.bfloat16) if self.autocast else nullcontext()
        with context:
            return F.cross_entropy(self.model(self.images).float(), self.labels)

    def measured_step(self) -> tuple[Held, float]:
        """What a step holds, and its loss."""
        for parameter in self.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # allocates its state
        self.optimizer.zero_grad()
        with LiveBytes() as live:
            loss = self.forward()
            after_forward = live.now
            loss.backward()
            value = float(loss.detach())
            del loss
            after_backward, until_step = live.now, live.peak
            live.restart_peak()
            self.optimizer.step()
            if self.sparsifier is not None:
                self.sparsifier.step()
        return Held(after_forward, until_step, after_backward, live.peak), value


def dense(data: Data) -> Variant:
    """The limit, which has been measured already."""
    return Variant(lambda: None, 0, accept, figures=data.dense.figures(data.dense, data.weights))


def ours(data: Data, backend: str, recompute: bool | None) -> Variant:
    """``fk.Sparsifier``."""
    training = Training(data.network, data.precision, data.images, data.labels)
    schedule = fk.ConstantSchedule(data.network.sparsity)
    with fk.use_backend(backend):
        training.sparsifier = fk.Sparsifier(
            training.model, schedule=schedule, power=POWER, grad_scale=GRAD_SCALE, recompute=recompute
        )
        held, loss = training.measured_step()
    weights = sum(weight.parameter.numel() for weight in training.sparsifier.weights)
    return Variant(lambda: loss, 0, partial(data.gate, weights), figures=held.figures(data.dense, data.weights))


CASE = Case("memory", trials)
