"""The registry of backends: which one runs the ops on a device.

The first backend in the device's order that is available serves, unless one is named: by ``use_backend`` or, outside of
it, by the environment variable ``FEATHER_KERNELS_BACKEND``. A backend is probed on its first use on a device. Skipping
an unavailable backend is logged once per device. A named backend that cannot run raises; it never falls back. Powers
that a backend has no kernel for run on the reference.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, ClassVar, NamedTuple, cast

from feather_kernels.errors import BackendUnavailableError

if TYPE_CHECKING:
    import torch

    from feather_kernels.backends import cpp, cuda, reference, triton
    from feather_kernels.backends.interface import Backend

    # modules are loaded by name: here the type checker proves that each is a Backend, or names what it lacks
    _PROVEN: list[Backend] = [triton, cuda, cpp, reference]

NOT_INSTALLED = "is not installed"  # how the reason of a backend that is missing begins

_log = logging.getLogger("feather_kernels")


class Choice(NamedTuple):
    """The backend that serves a device, and its name."""

    name: str
    backend: Backend


class Registry:
    """The backends by name, and the choice among them for each device.

    Args:
        modules: the module of each backend by its name; imported when the backend is first considered.
        order: names in order of preference for each device type; every other type takes the reference.

    Attributes:
        modules: as given.
        order: as given.

    All methods may be called from several threads. The choice is process-wide, because autograd runs backward passes in
    threads of its own.
    """

    AUTO: ClassVar = "auto"
    ENVIRONMENT_VARIABLE: ClassVar = "FEATHER_KERNELS_BACKEND"

    def __init__(self, modules: Mapping[str, str], order: Mapping[str, tuple[str, ...]]) -> None:
        self.modules = dict(modules)
        self.order = dict(order)
        self._lock = threading.RLock()  # of everything below; a probe may itself call ops
        self._named: list[str] = []  # by the use_backend blocks that are open, the innermost last
        self._probed: dict[tuple[str, torch.device], str | None] = {}
        self._chosen: dict[tuple[str, torch.device], Choice] = {}
        self._without_kernel: set[torch.device] = set()  # where it is logged that a power has no kernel
        self._request: str | None = None  # what requested() said last; None where that may have changed
        self._serving: dict[torch.device, Backend] = {}  # choices under that request

    def backend_for(self, device: torch.device) -> Backend:
        """Return the backend that runs ops on ``device``.

        Args:
            device: the device of the tensors, with its index.

        Raises:
            BackendUnavailableError: no backend can run there, or the named one cannot.
        """
        return self._serving.get(device) or self._serve(device)  # the hot path: one lookup

    def backend_for_threshold(self, device: torch.device, power: float) -> Backend:
        """Return the backend that runs ``threshold`` of ``power`` on ``device``.

        Args:
            device: the device of the tensors, with its index.
            power: p of the operator. The reference runs it where the device's backend has no kernel for it.

        Raises:
            BackendUnavailableError: no backend can run there, or the named one cannot, or lacks the power.
        """
        backend = self._serving.get(device) or self._serve(device)
        powers = backend.POWERS
        return backend if powers is None or power in powers else self._instead_of_kernel(device, power, powers)

    def chosen_name(self, device: torch.device) -> str:
        """Return the name of the backend that ``backend_for`` returns; raises as it does."""
        return self._choice(device).name

    def requested(self) -> str:
        """Return the name of the backend that is asked for, or ``auto``.

        The environment is read at the first call, and again after ``reset`` or a ``use_backend`` block.

        Raises:
            ValueError: no backend has the name that the environment gives.
        """
        with self._lock:
            if self._request is None:
                variable = os.environ.get(self.ENVIRONMENT_VARIABLE) or self.AUTO
                self._request = (
                    self._named[-1] if self._named else self._check_name(variable, self.ENVIRONMENT_VARIABLE)
                )
            return self._request

    @contextmanager
    def use_backend(self, name: str) -> Iterator[None]:
        """Run every op inside the ``with`` block on the named backend.

        The choice is process-wide and holds for the backward passes that run inside the block. Graphs of torch.compile
        stay valid: they ask for the backend when they run.

        Args:
            name: ``triton``, ``cuda``, ``cpp`` or ``reference``; ``auto`` for the default order.

        Raises:
            ValueError: no backend has that name.
            BackendUnavailableError: raised by an op in the block where the named backend cannot run on its device.

        Example:
            >>> with fk.use_backend("reference"):
            ...     y = fk.functional.threshold(torch.tensor([0.2, -1.0]), 0.5, power=1)
            >>> y
            tensor([ 0.0000, -0.5000])
        """
        with self._lock:
            self._named.append(self._check_name(name, "backend"))
            self._reconsider()
        try:
            yield
        finally:
            with self._lock:
                self._named.pop()
                self._reconsider()

    def availability(self, device: torch.device) -> dict[str, str | None]:
        """Return the backends in the order of ``device``, each with the reason why it cannot run there, or None.

        Args:
            device: where each backend is probed, unless it was.
        """

        def reason(name: str) -> str | None:
            try:
                return self._probe(name, device)
            except RuntimeError as error:  # a full GPU, or an earlier kernel's error: not the backend's fault
                return f"could not be tried now: {error}"

        return {name: reason(name) for name in self._order_of(device)}

    def is_probed(self, name: str, device: torch.device) -> bool:
        """Return whether the result of probing a backend on ``device`` is remembered."""
        return (name, device) in self._probed

    @contextmanager
    def assume_available(self, name: str, device: torch.device) -> Iterator[None]:
        """Treat the named backend as available on ``device`` inside the ``with`` block, without a probe.

        Simulators of a device use it: what they put in the place of a GPU would not pass the probe. At the end of the
        block everything that was probed and chosen is forgotten.

        Args:
            name: the backend.
            device: where it can run from now on.
        """
        with self._lock:
            self._chosen.clear()
            self._probed[name, device] = None
            self._reconsider()
        try:
            yield
        finally:
            self.reset()

    def reset(self) -> None:
        """Forget what was probed and chosen, e.g. after a change of ``modules``, ``order`` or the environment."""
        with self._lock:
            self._probed.clear()
            self._chosen.clear()
            self._without_kernel.clear()
            self._reconsider()

    def _reconsider(self) -> None:
        self._request = None
        self._serving = {}

    def _serve(self, device: torch.device) -> Backend:
        with self._lock:  # one thread probes and logs; the request does not change meanwhile
            backend = self._choice(device).backend
            self._serving[device] = backend
            return backend

    def _choice(self, device: torch.device) -> Choice:
        with self._lock:
            key = self.requested(), device
            if key not in self._chosen:
                self._chosen[key] = self._choose(*key)
            return self._chosen[key]

    def _choose(self, request: str, device: torch.device) -> Choice:
        skipped: dict[str, str] = {}
        for name in self._order_of(device) if request == self.AUTO else (request,):
            reason = self._probe(name, device)
            if reason is None:
                _log_skipped(device, skipped, name)
                return Choice(name, self._load(name))
            skipped[name] = reason
        verdict = "no backend can" if request == self.AUTO else f"backend {request!r} cannot"
        reasons = {**skipped, **self.availability(device)}
        tried = "; ".join(f"{name}: {reason or 'available'}" for name, reason in reasons.items())
        raise BackendUnavailableError(f"{verdict} run on {device}. Probed: {tried}")

    def _instead_of_kernel(self, device: torch.device, power: float, powers: frozenset[float]) -> Backend:
        has = ", ".join(f"{p:g}" for p in sorted(powers))
        lacks = f"{device}: backend {self.chosen_name(device)!r} has the powers {has}, not {power}"
        if self.requested() != self.AUTO:
            raise BackendUnavailableError(f"{lacks}; the backends 'auto' and 'reference' run it")
        with self._lock:
            if device not in self._without_kernel:
                self._without_kernel.add(device)
                _log.info("%s; using 'reference' for it", lacks)
        return self._load("reference")

    def _order_of(self, device: torch.device) -> tuple[str, ...]:
        return self.order.get(device.type, ("reference",))

    def _probe(self, name: str, device: torch.device) -> str | None:
        key = (name, device)
        with self._lock:
            if key not in self._probed:
                self._probed[key] = self._import_problem(name) or self._load(name).probe(device)
            return self._probed[key]

    def _import_problem(self, name: str) -> str | None:
        """None if the backend's module can be imported, else the reason why not."""
        try:
            self._load(name)
        except Exception as error:  # e.g. a version of triton that lacks something, a library that does not load
            missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
            if missing and importlib.util.find_spec(missing) is None:  # all of it, not a part of a broken installation
                return f"{NOT_INSTALLED}: {error}"
            return f"cannot be imported: {type(error).__name__}: {error}"
        return None

    def _load(self, name: str) -> Backend:
        return cast("Backend", importlib.import_module(self.modules[name]))

    def _check_name(self, name: str, argument: str) -> str:
        if name != self.AUTO and name not in self.modules:
            raise ValueError(f"{argument} must be one of {', '.join([self.AUTO, *self.modules])}, got {name!r}")
        return name


def _log_skipped(device: torch.device, skipped: dict[str, str], chosen: str) -> None:
    """One line if any backend was skipped: a warning where one that is installed should run and does not."""
    if not skipped:
        return
    expected = device.type != "cpu" and any(not reason.startswith(NOT_INSTALLED) for reason in skipped.values())
    why = "; ".join(f"backend {name!r} cannot run: {reason}" for name, reason in skipped.items())
    _log.log(logging.WARNING if expected else logging.INFO, "%s: %s; using %r instead", device, why, chosen)


registry = Registry(
    modules={
        "triton": "feather_kernels.backends.triton",
        "cuda": "feather_kernels.backends.cuda",
        "cpp": "feather_kernels.backends.cpp",
        "reference": "feather_kernels.backends.reference",
    },
    order={"cuda": ("triton", "cuda", "reference"), "cpu": ("cpp", "reference")},
)
use_backend = registry.use_backend
