"""A whole training step: forward, backward, optimizer, threshold; what Feather adds to the dense one."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import feather_kernels as fk
from benchmarks import backends, gates, paper
from benchmarks.case import Case, Setting, Trial, Variant, accept
from benchmarks.inputs import sort_magnitudes, with_threshold
from feather_kernels.recipes.models import make_model

GRAD_SCALE = 0.5  # so that backward has work to do
POWER = 3.0
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # glibc's malloc.h
WITH_BYTES = "dense + bytes"
RELATIVE_LOSS, RELATIVE_GRADIENT = 1e-3, 1e-2  # allowed differences from the oracle: the network amplifies roundings


@dataclass(frozen=True)
class Network:
    """A model and the size of its batches."""

    title: str
    make: Callable[[], nn.Module]
    batch: int
    size: int
    classes: int
    sparsity: float
    rounds: int
    seconds: float


def resnet50() -> nn.Module:
    """torchvision's, freshly initialised."""
    from torchvision.models import resnet50  # an extra; only this case needs it

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return resnet50()


NETWORKS = (
    Network("ResNet-50, 224 px, batch 8", resnet50, 8, 224, 1000, 0.9, 25, 30.0),
    Network("ResNet-50, 128 px, batch 8", resnet50, 8, 128, 1000, 0.9, 40, 20.0),
    Network("ResNet-20, 32 px, batch 128", partial(make_model, "resnet20", 3, 100, 0), 128, 32, 100, 0.9, 40, 20.0),
)
SMOKE_NETWORKS = (Network("CNN, 8 px, batch 2", partial(make_model, "cnn", 3, 10, 0), 2, 8, 10, 0.5, 1, 0.0),)


@dataclass(frozen=True)
class Data:
    """A batch, and the loss and the weights' gradients of a first step that was computed from the definition."""

    network: Network
    device: torch.device
    images: Tensor
    labels: Tensor
    loss: float
    gradients: list[Tensor]

    def model(self) -> nn.Module:
        """The model at initialisation."""
        return self.network.make().to(self.device).train()

    def gate(self, training: Training, loss: Tensor) -> str | None:
        """Compare a first step with the oracle's."""
        if abs(float(loss) - self.loss) > RELATIVE_LOSS * abs(self.loss):
            return f"loss {float(loss):.6g}, not {self.loss:.6g}"
        for index, (weight, expected) in enumerate(zip(training.weights, self.gradients, strict=True)):
            if weight.grad is None:
                return f"weight {index} has no gradient"
            error, size = float((weight.grad - expected).norm()), float(expected.norm())
            if not error <= RELATIVE_GRADIENT * size:
                return f"weight {index}: the gradient, of norm {size:.3g}, is off by {error:.3g}"
        return None


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


def trials(setting: Setting) -> Iterator[Trial]:
    """Dense, dense with the bytes that Feather moves, ours, the paper's formula."""
    for network in SMOKE_NETWORKS if setting.smoke else NETWORKS:
        variants: dict[str, Any] = {"dense": dense, WITH_BYTES: dense_with_bytes}
        variants.update(backends.ours(setting.device, ours, only_default=True), paper=eager)
        prepare = partial(prepare_batch, network, setting.device)
        yield Trial(
            network.title, "", network.sparsity, prepare, variants, "dense", network.rounds, network.seconds, grad=True
        )


def keep_freed_memory() -> None:
    """From here on glibc gives no freed memory back to the system, as jemalloc and tcmalloc do not.

    By default it returns the top of its heap when that is large, and how often a step hits that limit is luck: 0 to
    50,000 page faults, up to 5 % of a step, on either side of the comparison. It holds for the process: the cases that
    come later (call, import) allocate next to nothing.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def prunable(model: nn.Module) -> list[Tensor]:
    """Weights of convolutions and linear layers."""
    return [layer.weight for layer in prunable_layers(model)]


def prunable_layers(model: nn.Module) -> list[Any]:
    """Convolutions and linear layers."""
    return [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]


def prepare_batch(network: Network, device: torch.device) -> Data:
    """A random batch, and the oracle: a dense model that holds P(w), its weights' gradients scaled afterwards.

    Sets how memory is freed from here on.
    """
    keep_freed_memory()
    generator = torch.Generator().manual_seed(3)
    images = torch.randn(network.batch, 3, network.size, network.size, generator=generator).to(device)
    labels = torch.randint(network.classes, (network.batch,), generator=generator).to(device)
    model = network.make().to(device).train()
    weights = tuple(weight.detach() for weight in prunable(model))
    t = with_threshold(weights, sort_magnitudes(weights), network.sparsity).threshold
    pruned = [weight.abs() <= t for weight in weights]
    for weight, zero in zip(weights, pruned, strict=True):
        weight.copy_(torch.where(zero, 0.0, gates.thresholded(weight.double(), t.double(), POWER)))
    loss = F.cross_entropy(model(images), labels)
    loss.backward()
    gradients = [_gradient(weight) for weight in prunable(model)]
    scaled = [torch.where(zero, g * GRAD_SCALE, g) for g, zero in zip(gradients, pruned, strict=True)]
    return Data(network, device, images, labels, float(loss.detach()), scaled)


def _gradient(weight: Tensor) -> Tensor:
    if weight.grad is None:
        raise RuntimeError("a weight has no gradient")
    return weight.grad


def dense(data: Data) -> Variant:
    """The limit: the step without Feather."""
    training = Training(data, data.model(), lambda: None)
    return Variant(training.step, training.bytes, accept)


def dense_with_bytes(data: Data) -> Variant:
    """The step without Feather, then torch moves the bytes that Feather does: a floor for the step with it.

    Copies of all weights for P(w) in forward and backward, products for their gradients' scaling, sums for selection.
    """
    model = data.model()
    weights = prunable(model)

    def scale(weight: Tensor) -> None:
        _gradient(weight).mul_(weight)  # the optimizer has used it

    @torch.no_grad()
    def move_bytes() -> None:
        for move in (Tensor.clone, Tensor.clone, scale, Tensor.sum):
            for weight in weights:
                move(weight)

    training = Training(data, model, move_bytes)
    return Variant(training.step, training.bytes, accept)


def ours(data: Data, backend: str) -> Variant:
    """``fk.Sparsifier``."""
    model = data.model()
    with fk.use_backend(backend):
        schedule = fk.ConstantSchedule(data.network.sparsity)
        sparsifier = fk.Sparsifier(model, schedule=schedule, power=POWER, grad_scale=GRAD_SCALE)
    training = Training(data, model, sparsifier.step)

    def run() -> Tensor:
        with fk.use_backend(backend):
            return training.step()

    return Variant(run, training.bytes, partial(data.gate, training))


def eager(data: Data) -> Variant:
    """The paper's formula in every layer, and its sort after every step."""
    model = data.model()
    shared = PaperThreshold()
    layers = prunable_layers(model)
    for layer in layers:
        layer.__class__ = PaperConv2d if isinstance(layer, nn.Conv2d) else PaperLinear
        layer.paper = shared
    weights = prunable(model)

    def select() -> None:
        shared.value = paper.magnitude_threshold(weights, data.network.sparsity)

    select()
    training = Training(data, model, select)
    return Variant(training.step, training.bytes, partial(data.gate, training))


class PaperThreshold:
    """T, shared by the layers of a model."""

    value = 0.0


class PaperFunction(torch.autograd.Function):
    """The paper's formula with its mask, saved for backward."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, t: float) -> Tensor:
        """P(w)."""
        value, mask = paper.threshold(weight, t, POWER)
        ctx.save_for_backward(mask)
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """The gradient, scaled by the mask."""
        return paper.scale_gradient(gradient, ctx.saved_tensors[0], GRAD_SCALE), None


class PaperConv2d(nn.Conv2d):
    """A convolution with P(weight)."""

    paper: PaperThreshold

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name for it)
        """As ``nn.Conv2d``."""
        return self._conv_forward(input, PaperFunction.apply(self.weight, self.paper.value), self.bias)


class PaperLinear(nn.Linear):
    """A linear layer with P(weight)."""

    paper: PaperThreshold

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name for it)
        """As ``nn.Linear``."""
        return F.linear(input, PaperFunction.apply(self.weight, self.paper.value), self.bias)


CASE = Case("train_step", trials)
