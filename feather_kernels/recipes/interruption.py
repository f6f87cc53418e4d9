"""Ctrl-C and SIGTERM, answered where the training can be continued from."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any


class Interrupted(Exception):  # noqa: N818  (a request, not an error)
    """Raised by ``Interruption.check`` after a signal."""


class Interruption:
    """While entered, the first SIGINT or SIGTERM is only noted; a second one acts as it would without this.

    Outside of the main thread, where Python delivers no signals, it does nothing.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.noted = False
        self._previous: dict[signal.Signals, Any] = {}  # handlers to put back

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.noted:
            raise Interrupted

    def __enter__(self) -> Interruption:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._note) for number in self.SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002
        self.noted = True
        self._restore()

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}
