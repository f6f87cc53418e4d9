"""Which thresholds the threshold op was called with: how a sparsifier finds layers that never ran."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


class CallRecord:
    """Addresses of the thresholds that ``threshold`` was called with between ``start`` and ``stop``.

    Every forward passes through the op, eager, compiled or checkpointed, and every layer has a threshold of its own. So
    a threshold that is missing here belongs to a layer whose weight is read without its forward.
    """

    active: ClassVar[list[CallRecord]] = []

    def __init__(self) -> None:
        self.addresses: set[int] = set()
        self._elsewhere = threading.local()

    def start(self) -> None:
        """Begin to record."""
        self.active.append(self)

    def stop(self) -> None:
        """Record no more; stopping twice is harmless."""
        if self in self.active:
            self.active.remove(self)

    def redirect(self, addresses: set[int] | None) -> None:
        """Note the calls of this thread in ``addresses`` instead; None ends that."""
        self._elsewhere.addresses = addresses

    @classmethod
    def add(cls, t: Tensor) -> None:
        """Note a call with threshold ``t``."""
        for record in tuple(cls.active):  # a garbage collection may end one of them here
            elsewhere = getattr(record._elsewhere, "addresses", None)
            (record.addresses if elsewhere is None else elsewhere).add(t.data_ptr())
