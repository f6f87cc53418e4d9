"""Where the parts run, and how large their inputs are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from feather_kernels.backends.registry import registry
from feather_kernels.cli.gpu_report import machine
from feather_kernels.cli.gpu_report.clock import Meter, event_meter, host_meter
from feather_kernels.errors import BackendUnavailableError


@dataclass(frozen=True)
class Target:
    """A device and how to measure on it; tests replace it by a simulator.

    Attributes:
        device: of all tensors.
        facts: describes the machine.
        on_device, on_host: make the meters for work on the device, and for the host's share of small work.
        backend: for layers and training steps; ``auto`` for the default one.
        elements: the number of weights in the inputs of the ops.
        rounds: how often each variant is measured.
        layers: the number of layers whose host cost is measured.
        large: whether to train real networks instead of tiny ones.
        compiler: the backend of torch.compile.
    """

    device: torch.device
    facts: Callable[[], dict[str, str]]
    on_device: Callable[[], Meter]
    on_host: Callable[[], Meter]
    backend: str
    elements: int
    rounds: int
    layers: int
    large: bool
    compiler: str = "inductor"

    def require(self, backend: str) -> None:
        """Raise BackendUnavailableError, with the reason, if a backend cannot run here."""
        reason = registry.availability(self.device).get(backend)
        if reason is not None:
            raise BackendUnavailableError(f"{backend}: {reason}")
        with registry.use_backend(backend):
            registry.backend_for(self.device)


def gpu(name: str, quick: bool) -> Target:
    """A CUDA device by its name; ``quick`` means small inputs and few rounds."""
    device = torch.device(name)
    torch.cuda.set_device(device)
    return Target(
        device,
        lambda: machine.facts(device),
        lambda: event_meter(device),
        lambda: host_meter(device),
        backend=registry.AUTO,
        elements=1 << (20 if quick else 25),
        rounds=5 if quick else 30,
        layers=4 if quick else 10,
        large=not quick,
    )
