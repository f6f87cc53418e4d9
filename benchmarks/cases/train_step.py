"""A whole training step (forward, backward, optimizer, threshold) beside the dense one in the same memory format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import feather_kernels as fk
from benchmarks import backends, networks, paper
from benchmarks.case import Case, Setting, Trial, Variant, accept
from benchmarks.networks import POWER, RESNET20, RESNET50_128, RESNET50_224, Network, prunable

GRAD_SCALES = (1.0, 0.5)
LIMIT = "dense"
WITH_BYTES = "dense + bytes"
RECOMPUTED = ", recomputed"
RELATIVE_LOSS, RELATIVE_GRADIENT = 1e-3, 1e-2  # allowed differences from the oracle: the network amplifies roundings


class Comparison(NamedTuple):
    """One trial: a network in a memory format.

    Attributes:
        network: the network.
        channels_last: its weights and images are laid out so.
        with_paper: measure the paper's code too.
        with_recompute: measure recompute=True and the dense step with Feather's bytes too.
        rounds, seconds: as in ``Trial``.
    """

    network: Network
    channels_last: bool = False
    with_paper: bool = True
    with_recompute: bool = False
    rounds: int = 40
    seconds: float = 20.0

    @property
    def operation(self) -> str:
        """How results name it."""
        return self.network.title + (", channels_last" if self.channels_last else "")


COMPARISONS = (
    Comparison(RESNET50_224, rounds=25, seconds=30.0),
    Comparison(RESNET50_224, channels_last=True, with_paper=False, rounds=25, seconds=30.0),
    Comparison(RESNET50_128, with_recompute=True),
    Comparison(RESNET50_128, channels_last=True, with_paper=False),
    Comparison(RESNET20),
)
SMOKE_COMPARISONS = (
    Comparison(networks.SMOKE, with_recompute=True, rounds=1),
    Comparison(networks.SMOKE, channels_last=True, with_paper=False, rounds=1),
)


def suffix(grad_scale: float) -> str:
    """What the variants' names end in."""
    return f" grad_scale {grad_scale:g}"


def trials(setting: Setting) -> Iterator[Trial]:
    """Dense, ours at both gradient scales, and where asked for the rest."""
    for comparison in SMOKE_COMPARISONS if setting.smoke else COMPARISONS:
        variants: dict[str, Any] = {LIMIT: dense}
        for grad_scale in GRAD_SCALES:
            make = partial(ours, grad_scale=grad_scale, recompute=None)
            variants |= backends.ours(setting.device, make, True, suffix(grad_scale))
        if comparison.with_recompute:
            make = partial(ours, grad_scale=1.0, recompute=True)
            variants |= backends.ours(setting.device, make, True, suffix(1.0) + RECOMPUTED)
            variants[WITH_BYTES] = dense_with_bytes
        if comparison.with_paper:
            variants["paper"] = eager
        prepare = partial(prepare_batch, comparison, setting.device)
        limits = comparison.rounds, comparison.seconds
        operation, sparsity = comparison.operation, comparison.network.sparsity
        yield Trial(operation, "", sparsity, prepare, variants, LIMIT, *limits, grad=True)


@dataclass(frozen=True)
class Data:
    """A batch, and the loss and the weights' gradients of a first step that was computed from the definition."""

    network: Network
    device: torch.device
    memory_format: torch.memory_format
    images: Tensor
    labels: Tensor
    loss: float
    gradients: list[Tensor]
    pruned: list[Tensor]

    def model(self) -> nn.Module:
        """The model at initialisation."""
        return make_model(self.network, self.device, self.memory_format)

    def gate(self, training: Training, grad_scale: float, loss: Tensor) -> str | None:
        """Compare a first step with the oracle's."""
        if abs(float(loss) - self.loss) > RELATIVE_LOSS * abs(self.loss):
            return f"loss {float(loss):.6g}, not {self.loss:.6g}"
        for index, weight in enumerate(training.weights):
            if weight.grad is None:
                return f"weight {index} has no gradient"
            gradient = self.gradients[index]
            expected = torch.where(self.pruned[index], gradient * grad_scale, gradient)
            error, size = float((weight.grad - expected).norm()), float(expected.norm())
            if not error <= RELATIVE_GRADIENT * size:
                return f"weight {index}: the gradient, of norm {size:.3g}, is off by {error:.3g}"
        return None


def make_model(network: Network, device: torch.device, memory_format: torch.memory_format) -> nn.Module:
    """The network's model, to be trained."""
    model: Any = network.make()
    return model.to(device, memory_format=memory_format).train()


def prepare_batch(comparison: Comparison, device: torch.device) -> Data:
    """A random batch, and the oracle: a dense model that holds P(w), and its weights' gradients."""
    memory_format = torch.channels_last if comparison.channels_last else torch.contiguous_format
    images, labels = comparison.network.inputs(device)
    images = images.to(memory_format=memory_format)
    model = make_model(comparison.network, device, memory_format)
    pruned = networks.write_thresholded(model, comparison.network.sparsity)
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    gradients = [gradient_of(weight) for weight in prunable(model)]
    return Data(comparison.network, device, memory_format, images, labels, float(loss.detach()), gradients, pruned)


def gradient_of(weight: Tensor) -> Tensor:
    """Its gradient, which must be there."""
    if weight.grad is None:
        raise RuntimeError("a weight has no gradient")
    return weight.grad


class Training:
    """A model with SGD and what it does after each step."""

    def __init__(self, data: Data, model: nn.Module, after_step: Callable[[], object]) -> None:
        self.data = data
        self.model = model
        self.weights = prunable(model)
        self.after_step = after_step
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        self.optimizer.step()  # allocates the momentum and changes nothing, the gradients being 0

    def step(self) -> Tensor:
        """One step; returns the loss. The gradients stay for the gate."""
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.data.images), self.data.labels)
        loss.backward()
        self.optimizer.step()
        self.after_step()
        return loss.detach()

    @property
    def bytes(self) -> int:
        """Size of the prunable weights: a step moves much more, but this is what Feather is about."""
        return 4 * sum(weight.numel() for weight in self.weights)


def dense(data: Data) -> Variant:
    """The limit: the step without Feather."""
    training = Training(data, data.model(), lambda: None)
    return Variant(training.step, training.bytes, accept)


def dense_with_bytes(data: Data) -> Variant:
    """The step without Feather, then torch moves the bytes that Feather does at grad_scale 0.5: a floor for it.

    A copy of all weights for P(w), products for the scaling of their gradients, sums for selection.
    """
    model = data.model()
    weights = prunable(model)

    def scale(weight: Tensor) -> Tensor:
        return torch.mul(gradient_of(weight), weight)

    @torch.no_grad()
    def move_bytes() -> None:
        for move in (Tensor.clone, scale, Tensor.sum):
            for weight in weights:
                move(weight)

    training = Training(data, model, move_bytes)
    return Variant(training.step, training.bytes, accept)


def ours(data: Data, backend: str, grad_scale: float, recompute: bool | None) -> Variant:
    """``fk.Sparsifier``; P(w) is kept for backward unless ``recompute``, these networks being small."""
    model = data.model()
    schedule = fk.ConstantSchedule(data.network.sparsity)
    with fk.use_backend(backend):
        sparsifier = fk.Sparsifier(model, schedule=schedule, power=POWER, grad_scale=grad_scale, recompute=recompute)
    training = Training(data, model, sparsifier.step)

    def run() -> Tensor:
        with fk.use_backend(backend):
            return training.step()

    return Variant(run, training.bytes, partial(data.gate, training, grad_scale))


def eager(data: Data) -> Variant:
    """The paper's formula in every layer, and its sort after every step."""
    model, grad_scale = data.model(), 0.5
    weights, shared = prunable(model), paper.make_sparse(model, POWER, grad_scale)

    def select() -> None:
        shared.value = paper.magnitude_threshold(weights, data.network.sparsity)

    select()
    training = Training(data, model, select)
    return Variant(training.step, training.bytes, partial(data.gate, training, grad_scale))


CASE = Case("train_step", trials)
