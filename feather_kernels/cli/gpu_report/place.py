"""Where the parts run and how large their inputs are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from feather_kernels.backends.registry import registry
from feather_kernels.cli.gpu_report import machine
from feather_kernels.cli.gpu_report.clock import Meter, event_meter, host_meter
from feather_kernels.errors import BackendUnavailableError


@dataclass(frozen=True)
class Place:
    """A device with the means to measure on it; the tests put a simulator of GPUs in its place.

    Attributes:
        device: of all tensors.
        facts: describes the machine.
        on_device, on_host: say what work costs the device, and what small work costs the host.
        backend: of layers and training steps; ``auto`` for the one that a user gets.
        elements: of the weights in the ops' inputs.
        rounds: how often a variant is measured.
        layers: number of those whose host cost is measured.
        large: real networks; else tiny ones.
        compiler: backend of torch.compile.
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
        """Raise BackendUnavailableError, with the reason, where a backend cannot run here."""
        reason = registry.availability(self.device).get(backend)
        if reason is not None:
            raise BackendUnavailableError(f"{backend}: {reason}")
        with registry.use_backend(backend):
            registry.backend_for(self.device)


def gpu(name: str, quick: bool) -> Place:
    """A CUDA device; ``quick`` has small inputs and few rounds."""
    device = torch.device(name)
    torch.cuda.set_device(device)
    return Place(
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
