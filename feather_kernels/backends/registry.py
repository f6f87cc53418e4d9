"""Which backend runs an op: device type -> ordered backends, probed on first use.

A backend is a module that is a ``backends.interface.Backend``; it knows nothing above it.
The first available backend in the device's order serves, unless one was named: by ``use_backend`` or, outside of it,
by the environment variable ``FEATHER_KERNELS_BACKEND``. Skipping an unavailable backend is logged, once per device.
A named backend that cannot run raises; it never falls back. Powers without a compiled kernel run on the reference.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, cast

from feather_kernels.errors import BackendUnavailableError

if TYPE_CHECKING:  # that each module is a Backend is for the type checker to prove
    import torch

    from feather_kernels.backends import cpp, cuda, reference, triton
    from feather_kernels.backends.interface import Backend

    _BACKENDS: list[Backend] = [triton, cuda, cpp, reference]

ENVIRONMENT_VARIABLE = "FEATHER_KERNELS_BACKEND"
AUTO = "auto"


# name -> module; imported when the backend is first considered
BACKENDS: dict[str, str] = {
    "triton": "feather_kernels.backends.triton",
    "cuda": "feather_kernels.backends.cuda",
    "cpp": "feather_kernels.backends.cpp",
    "reference": "feather_kernels.backends.reference",
}
# device type -> backends in the order of preference; any other device type takes the reference
ORDER: dict[str, tuple[str, ...]] = {"cuda": ("triton", "cuda", "reference"), "cpu": ("cpp", "reference")}
DEFAULT_ORDER: tuple[str, ...] = ("reference",)

NOT_INSTALLED = "is not installed"  # how such a reason begins

_log = logging.getLogger("feather_kernels")
_lock = threading.RLock()  # of the state below; a probe may itself call ops
_named: list[str] = []  # process-wide, because autograd runs backward passes in threads of its own
_probed: dict[tuple[str, torch.device], str | None] = {}
_chosen: dict[tuple[str, torch.device], tuple[str, Backend]] = {}
_without_kernel: set[torch.device] = set()  # of which it is logged that a power has no kernel there
_in_force: str | None = None  # what requested() said last; None where that may have changed


def backend_for(device: torch.device) -> Backend:
    """The backend that runs ops on ``device``; raises BackendUnavailableError if there is none."""
    choice = _chosen.get((_in_force, device))  # type: ignore[arg-type]  # every op comes here: one look
    return (choice or _choice(device))[1]


def backend_for_threshold(device: torch.device, power: float) -> Backend:
    """The backend that runs ``threshold`` of ``power``: the reference where the one of ``device`` lacks the power.

    Raises BackendUnavailableError if there is none, or if a backend that lacks the power was named.
    """
    choice = _chosen.get((_in_force, device))  # type: ignore[arg-type]
    backend = (choice or _choice(device))[1]
    powers = backend.POWERS
    return backend if powers is None or power in powers else _instead_of_kernel(device, power, powers)


def _instead_of_kernel(device: torch.device, power: float, powers: frozenset[float]) -> Backend:
    name, request = _choice(device)[0], requested()
    lacks = f"{device}: backend {name!r} has the powers {', '.join(f'{p:g}' for p in sorted(powers))}, not {power}"
    if request != AUTO:
        raise BackendUnavailableError(f"{lacks}; the backends 'auto' and 'reference' run it")
    with _lock:
        if device not in _without_kernel:
            _without_kernel.add(device)
            _log.info("%s; using 'reference' for it", lacks)
    return _load("reference")


def chosen_name(device: torch.device) -> str:
    """The name in ``BACKENDS`` of what ``backend_for`` returns; raises as it does."""
    return _choice(device)[0]


def requested() -> str:
    """The backend asked for by name, or ``auto``; raises ValueError for a name that no backend has.

    The environment is read at the first call, and again after ``reset`` or a ``use_backend`` block.
    """
    global _in_force
    with _lock:
        if _in_force is None:
            variable = os.environ.get(ENVIRONMENT_VARIABLE) or AUTO
            _in_force = _named[-1] if _named else check_name(variable, ENVIRONMENT_VARIABLE)
        return _in_force


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every op inside the ``with`` block on the named backend (``auto`` for the default order).

    The choice is process-wide, holds for the backward passes run inside the block, and does not invalidate graphs
    compiled by torch.compile: they ask for the backend when they run.

    Raises:
        ValueError: no backend has that name.
        BackendUnavailableError: when an op runs on a device where the named backend cannot.
    """
    with _lock:
        _named.append(check_name(name, "backend"))
        _reconsider()
    try:
        yield
    finally:
        with _lock:
            _named.pop()
            _reconsider()


def availability(device: torch.device) -> dict[str, str | None]:
    """Every backend considered for ``device``, in order, with the reason why it is unavailable, or None."""

    def reason(name: str) -> str | None:
        try:
            return _probe(name, device)
        except RuntimeError as error:  # a full GPU, or an error of an earlier kernel: says nothing about the backend
            return f"could not be tried now: {error}"

    return {name: reason(name) for name in ORDER.get(device.type, DEFAULT_ORDER)}


def check_name(name: str, argument: str) -> str:
    """Return ``name`` if it is ``auto`` or a known backend, else raise ValueError naming the argument."""
    if name != AUTO and name not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join([AUTO, *BACKENDS])}, got {name!r}")
    return name


def reset() -> None:
    """Forget what was probed and chosen, e.g. after a change of the backend table or the environment."""
    with _lock:
        _probed.clear()
        _chosen.clear()
        _without_kernel.clear()
        _reconsider()


def _reconsider() -> None:
    global _in_force
    _in_force = None


def _choice(device: torch.device) -> tuple[str, Backend]:
    key = (requested(), device)
    choice = _chosen.get(key)
    if choice is None:
        with _lock:  # one thread probes and logs
            choice = _chosen.get(key) or _chosen.setdefault(key, _choose(*key))
    return choice


def _choose(name: str, device: torch.device) -> tuple[str, Backend]:
    passed: dict[str, str] = {}
    for candidate in ORDER.get(device.type, DEFAULT_ORDER) if name == AUTO else (name,):
        reason = _probe(candidate, device)
        if reason is None:
            _log_passed_over(device, passed, candidate)
            return candidate, _load(candidate)
        passed[candidate] = reason
    verdict = "no backend can" if name == AUTO else f"backend {name!r} cannot"
    reasons = {**passed, **availability(device)}
    tried = "; ".join(f"{candidate}: {reason or 'available'}" for candidate, reason in reasons.items())
    raise BackendUnavailableError(f"{verdict} run on {device}. Probed: {tried}")


def _log_passed_over(device: torch.device, passed: dict[str, str], chosen: str) -> None:
    """One line if any backend was passed over: a warning where one that is installed should run and does not."""
    if not passed:
        return
    expected = device.type != "cpu" and any(not reason.startswith(NOT_INSTALLED) for reason in passed.values())
    why = "; ".join(f"backend {name!r} cannot run: {reason}" for name, reason in passed.items())
    _log.log(logging.WARNING if expected else logging.INFO, "%s: %s; using %r instead", device, why, chosen)


def _probe(name: str, device: torch.device) -> str | None:
    key = (name, device)
    with _lock:
        if key not in _probed:
            _probed[key] = _import_problem(name) or _load(name).probe(device)
        return _probed[key]


def _import_problem(name: str) -> str | None:
    """None if the backend's module can be imported, else the reason why not."""
    try:
        _load(name)
    except Exception as error:  # e.g. a version of triton that lacks something, a library that does not load
        missing = (error.name or "").partition(".")[0] if isinstance(error, ModuleNotFoundError) else ""
        if missing and importlib.util.find_spec(missing) is None:  # all of it, not a part of a broken installation
            return f"{NOT_INSTALLED}: {error}"
        return f"cannot be imported: {type(error).__name__}: {error}"
    return None


def _load(name: str) -> Backend:
    return cast("Backend", importlib.import_module(BACKENDS[name]))
