"""Ctrl-C and SIGTERM, answered where the training can be continued from."""

from __future__ import annotations

import signal
import threading
from contextlib import ExitStack
from types import FrameType


class Interrupted(Exception):  # noqa: N818  (a request, not an error)
    """Raised by ``Interruption.check`` after a signal."""


class Interruption(ExitStack):
    """While entered, the first SIGINT or SIGTERM is only noted; a second one acts as it would without this.

    Outside of the main thread, where Python delivers no signals, it does nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        super().__init__()
        self.noted = False

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.noted:
            raise Interrupted

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self.callback(signal.signal, number, signal.signal(number, self._note))
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.noted = True
        self.close()  # puts the handlers back
