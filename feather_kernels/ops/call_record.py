"""Records the thresholds that the threshold op was called with, by which a sparsifier finds layers that never ran."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor


class CallRecord:
    """Collects the addresses of the thresholds that ``threshold`` is called with between ``start`` and ``stop``.

    Every forward, eager, compiled or checkpointed, calls the op, and every layer has a threshold of its own. So a
    threshold that is missing here belongs to a layer whose weight is read without its forward.

    Attributes:
        active: the records between ``start`` and ``stop``.
        addresses: what was collected.
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
        """Collect the calls of this thread in another set from now on.

        Args:
            addresses: the set, or None for the record's own again.
        """
        self._elsewhere.addresses = addresses

    @classmethod
    def add(cls, t: Tensor) -> None:
        """Record a call with threshold ``t``."""
        for record in tuple(cls.active):  # a garbage collection in the loop may stop one of them
            elsewhere = getattr(record._elsewhere, "addresses", None)
            (record.addresses if elsewhere is None else elsewhere).add(t.data_ptr())
