"""The parts that measure what sparsity costs beyond the ops: small layers on the host, and whole training steps."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feather_kernels.backends.registry import registry
from feather_kernels.cli.gpu_report.clock import interleaved, spread
from feather_kernels.cli.gpu_report.layers import POWER, make_layers
from feather_kernels.cli.train.models import make_model
from feather_kernels.sparsify import ConstantSchedule, Sparsifier

if TYPE_CHECKING:
    from feather_kernels.cli.gpu_report.target import Target

Rows = Iterator[dict[str, object]]

SPARSITY = 0.9
VARIANTS = {"dense": None, "grad_scale 1": 1.0, "grad_scale 0.5": 0.5}
# allowed relative differences from the reference backend; a network amplifies rounding errors
RELATIVE, RELATIVE_OF_NETWORK = 1e-3, 5e-2


def host_rows(target: Target, compiled: bool) -> Rows:
    """Measure forward and backward of small layers; in eager mode also the sparsifier's step beside SGD's."""
    meter, compiler = target.on_host(), target.compiler if compiled else None
    made, wrong = {}, {}
    with registry.use_backend(target.backend):
        for name, grad_scale in VARIANTS.items():
            made[name] = make_layers(target.layers, target.device, grad_scale, compiler)
            wrong[name] = difference(made[name].both, list(made[name].model.parameters()))
        runs = {name: partial(meter, layers.both) for name, layers in made.items()}
        for name, figures in interleaved(runs, dict.fromkeys(runs, target.rounds), target.rounds).items():
            what = f"layer, {'compiled' if compiled else 'eager'}"
            yield {"what": what, "variant": name, "figures": spread(figures, target.layers), "wrong": wrong[name]}
        sparsifier = made["grad_scale 1"].sparsifier
        if compiled or sparsifier is None:
            return
        optimizer = torch.optim.SGD(made["dense"].model.parameters(), lr=0.0)
        steps: dict[str, Callable[[], object]] = {"SGD.step": optimizer.step, "Sparsifier.step": sparsifier.step}
        runs = {name: partial(meter, step) for name, step in steps.items()}
        for name, figures in interleaved(runs, dict.fromkeys(runs, target.rounds), target.rounds).items():
            what = f"step of {target.layers} layers"
            yield {"what": what, "variant": name, "figures": spread(figures), "wrong": None}


def difference(run: Callable[[], Tensor], parameters: list[nn.Parameter], relative: float = RELATIVE) -> str | None:
    """How the result of ``run`` and the gradients that it leaves differ from the reference backend's, or None."""

    def results() -> list[Tensor]:
        found = [run().detach()]
        found += [parameter.grad for parameter in parameters if parameter.grad is not None]
        return [tensor.double().clone() for tensor in found]

    ours = results()
    with registry.use_backend("reference"):
        wanted = results()
    names = ["the result", *(f"gradient {index}" for index in range(len(parameters)))]
    for name, tensor, expected in zip(names, ours, wanted, strict=True):
        error, size = float((tensor - expected).norm()), float(expected.norm())
        if not error <= (RELATIVE if name == names[0] else relative) * size:
            return f"{name}, of norm {size:.3g}, is {error:.3g} off the reference backend's"
    return None


def step_rows(target: Target) -> Rows:
    """Measure training steps of networks, dense and sparse: forward, backward, SGD with momentum, threshold."""
    meter = target.on_device()
    for network, (make, inputs, labels) in networks(target).items():
        with registry.use_backend(target.backend):
            trainings = {name: Training(make(), inputs, labels, grad_scale) for name, grad_scale in VARIANTS.items()}
            wrong = {name: training.wrong() for name, training in trainings.items()}
            runs = {name: partial(meter, training.step) for name, training in trainings.items()}
            for run in runs.values():
                run()  # allocates
            found = interleaved(runs, dict.fromkeys(runs, target.rounds), target.rounds)
        weights = trainings["grad_scale 1"].numel
        for name, figures in found.items():
            row = {"what": network, "variant": name, "weights": weights, "figures": spread(figures)}
            yield {**row, "wrong": wrong[name]}


class Training:
    """A model with its batch and SGD; it is sparse if ``grad_scale`` is given."""

    def __init__(self, model: nn.Module, inputs: Tensor, labels: Tensor, grad_scale: float | None) -> None:
        self.model, self.inputs, self.labels = model.to(inputs.device).train(), inputs, labels
        schedule = ConstantSchedule(SPARSITY)
        self.sparsifier = None
        if grad_scale is not None:
            self.sparsifier = Sparsifier(model, schedule=schedule, power=POWER, grad_scale=grad_scale)
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)

    @property
    def numel(self) -> int:
        """The number of elements in the prunable weights; 0 if the model is dense."""
        return 0 if self.sparsifier is None else self.sparsifier.report().numel

    def loss(self) -> Tensor:
        """Run forward and backward, and return the loss."""
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(self.inputs), self.labels)
        loss.backward()
        return loss

    def step(self) -> None:
        """Take a training step."""
        self.loss()
        self.optimizer.step()
        if self.sparsifier is not None:
            self.sparsifier.step()

    def wrong(self) -> str | None:
        """What is wrong with the model before its first step, or None."""
        if self.sparsifier is None:
            return None
        zeros, wanted = self.sparsifier.report().zeros, math.floor((self.numel - 1) * SPARSITY) + 1
        if zeros < wanted:
            return f"{zeros} weights of {self.numel} are pruned, not {wanted}"
        return difference(self.loss, list(self.model.parameters()), RELATIVE_OF_NETWORK)


class Transformer(nn.Module):
    """Transformer encoder layers over tokens, and a classifier of their mean."""

    def __init__(self, width: int, layers: int, classes: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, max(1, width // 64), 4 * width, dropout=0.0, batch_first=True)
            for _ in range(layers)
        )
        self.classifier = nn.Linear(width, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, L, width) -> (B, classes)."""
        for layer in self.layers:
            tokens = layer(tokens)
        return self.classifier(tokens.mean(1))


def networks(target: Target) -> dict[str, tuple[Callable[[], nn.Module], Tensor, Tensor]]:
    """A small network and one with large weights: how to make them, always with the same weights, and a batch."""
    name, pixels, images = ("resnet20", 32, 128) if target.large else ("cnn", 8, 2)
    width, layers, batch, tokens = (1024, 6, 8, 128) if target.large else (32, 2, 2, 4)
    classes, generator = 10, torch.Generator().manual_seed(0)

    def inputs(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu").to(target.device)

    def labels(count: int) -> Tensor:
        return torch.randint(classes, (count,), generator=generator, device="cpu").to(target.device)

    def transformer() -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return Transformer(width, layers, classes)

    convolutional = partial(make_model, name, 3, classes, 0)
    return {
        f"{name}, {pixels} px, batch {images}": (convolutional, inputs(images, 3, pixels, pixels), labels(images)),
        f"transformer, {layers} layers of width {width}, {batch} x {tokens} tokens": (
            transformer,
            inputs(batch, tokens, width),
            labels(batch),
        ),
    }
