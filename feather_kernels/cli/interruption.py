"""Ctrl-C and SIGTERM, handled at a point from which the training can continue."""

from __future__ import annotations

import signal
import threading
from contextlib import ExitStack
from types import FrameType


class Interrupted(Exception):  # noqa: N818  (a request, not an error)
    """Raised by ``Interruption.check`` after a signal."""


class Interruption(ExitStack):
    """A context in which the first SIGINT or SIGTERM is only noted; the second one acts as usual.

    It does nothing outside the main thread, to which Python delivers all signals.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        super().__init__()
        self.noted = False

    def check(self) -> None:
        """Raise Interrupted if a signal has arrived."""
        if self.noted:
            raise Interrupted

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self.callback(signal.signal, number, signal.signal(number, self._note))
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.noted = True
        self.close()  # restores the handlers
