"""Evaluation of a model that is still sparse: its forward in eval mode under no_grad, beside the dense one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import feather_kernels as fk
from benchmarks import backends, networks
from benchmarks.case import Case, Setting, Trial, Variant, accept
from benchmarks.networks import POWER, RESNET20, RESNET50_224, Network, prunable

LIMIT = "dense"
AVERAGED = " average after an update"
DECAY, DRIFT = 0.9, 1e-2  # of the average; of the weights that it follows, relative
RELATIVE_OUTPUT = 1e-3  # allowed difference from the oracle: the network amplifies roundings
NETWORKS = (RESNET50_224, RESNET20)


@dataclass(frozen=True)
class Data:
    """A batch of images."""

    network: Network
    device: torch.device
    images: Tensor

    def model(self) -> nn.Module:
        """The model at initialisation, in eval mode."""
        return self.network.make().to(self.device).eval()

    def sparse_model(self) -> nn.Module:
        """The same, sparse; the sparsifier lives on in its hook."""
        model = self.model()
        fk.Sparsifier(model, schedule=fk.ConstantSchedule(self.network.sparsity), power=POWER)
        return model

    def forward(self, model: nn.Module, backend: str) -> Tensor:
        """The model's outputs."""
        with fk.use_backend(backend):
            return model(self.images)

    def gate(self, model: nn.Module, outputs: Tensor) -> str | None:
        """Compare with a dense model that holds P of the weights that this one has now."""
        expected_model = self.model()
        expected_model.load_state_dict(model.state_dict())
        networks.write_thresholded(expected_model, self.network.sparsity)
        expected = expected_model(self.images)
        error, size = float((outputs - expected).norm()), float(expected.norm())
        return None if error <= RELATIVE_OUTPUT * size else f"outputs of norm {size:.3g} are off by {error:.3g}"


def trials(setting: Setting) -> Iterator[Trial]:
    """Dense; the live sparse model; the average of one, whose weights have just changed, so that it selects first."""
    for network in networks.sizes(setting, *NETWORKS):
        variants: dict[str, Any] = {
            LIMIT: dense,
            **backends.ours(setting.device, live, only_default=True),
            **backends.ours(setting.device, average, only_default=True, suffix=AVERAGED),
        }
        prepare = partial(prepare_images, network, setting.device)
        yield Trial(network.title, "", network.sparsity, prepare, variants, LIMIT, setting.rounds(40), 12.0)


def prepare_images(network: Network, device: torch.device) -> Data:
    """A random batch."""
    return Data(network, device, network.inputs(device)[0])


def weight_bytes(model: nn.Module) -> int:
    """Size of the prunable weights, which every variant reads."""
    return 4 * sum(weight.numel() for weight in prunable(model))


def dense(data: Data) -> Variant:
    """The limit."""
    model = data.model()
    return Variant(lambda: model(data.images), weight_bytes(model), accept)


def live(data: Data, backend: str) -> Variant:
    """The sparse model with its sparsifier, as in training."""
    with fk.use_backend(backend):
        model = data.sparse_model()
    return Variant(partial(data.forward, model, backend), weight_bytes(model), partial(data.gate, model))


def average(data: Data, backend: str) -> Variant:
    """An exponential moving average of a sparse model, brought up to date before each forward, untimed."""
    with fk.use_backend(backend):
        model = data.sparse_model()
        averaged = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(DECAY))
    averaged.update_parameters(model)
    generator = torch.Generator(data.device).manual_seed(5)
    for weight in prunable(model):
        noise = torch.randn(weight.shape, generator=generator, device=data.device)
        weight.add_(noise * weight.std(), alpha=DRIFT)
    return Variant(
        partial(data.forward, averaged, backend),
        weight_bytes(model),
        partial(data.gate, averaged.module),
        before=partial(averaged.update_parameters, model),
    )


CASE = Case("evaluation", trials)
