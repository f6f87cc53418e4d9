"""Bytes that a program holds, counted op by op: the same in every run, on any machine."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Counts the storages made inside it that are still alive. What an op allocates for itself is not seen.

    Attributes:
        live: bytes of each storage that is alive.
        peak: bytes that were alive at most since it began, or since ``restart_peak``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an op and take account of the storages of its results."""
        known = {x.untyped_storage()._cdata for x in tree_iter((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_iter(result):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                key = storage._cdata
                if key not in known and key not in self.live:
                    self.live[key] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, key, None)
        self.peak = max(self.peak, self.now)
        return result

    @property
    def now(self) -> int:
        """Bytes that are alive."""
        return sum(self.live.values())

    def restart_peak(self) -> None:
        """Let ``peak`` begin anew."""
        self.peak = self.now
