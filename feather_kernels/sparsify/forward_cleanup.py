"""Runs cleanups when a forward of the model ends, per thread and innermost first."""

from __future__ import annotations

import threading
from collections.abc import Callable
from types import FrameType


class _Forward:
    """A running forward.

    Attributes:
        frame: in which it was called.
        undo: the cleanups to call at its end.
        inner: number of forwards without cleanups that run inside it.
    """

    def __init__(self, frame: FrameType, undo: list[Callable[[], None]]) -> None:
        self.frame = frame
        self.undo = undo
        self.inner = 0


class ForwardCleanup:
    """The running forwards of a model, with their cleanups."""

    def __init__(self) -> None:
        self._threads = threading.local()

    def begin(self, frame: FrameType, undo: list[Callable[[], None]]) -> None:
        """Note that a forward begins.

        Args:
            frame: in which it was called.
            undo: cleanups to call at its end, last one first.
        """
        self.clean(frame)
        running = self._running()
        if undo:
            running.append(_Forward(frame, undo))
        elif running:
            running[-1].inner += 1

    def end(self) -> None:
        """Clean up after the forward that ends; the model's forward hook calls this, after exceptions too."""
        running = self._running()
        if running and running[-1].inner:
            running[-1].inner -= 1
        elif running:
            self._undo(running.pop())

    def clean(self, frame: FrameType) -> None:
        """Clean up after interrupted forwards that do not enclose ``frame``: KeyboardInterrupt skips torch's hooks."""
        running = self._running()
        while running and not encloses(running[-1].frame, frame):
            self._undo(running.pop())

    def _running(self) -> list[_Forward]:
        if not hasattr(self._threads, "running"):
            self._threads.running = []
        return self._threads.running

    @staticmethod
    def _undo(forward: _Forward) -> None:
        for undo in reversed(forward.undo):
            undo()


def encloses(outer: FrameType, frame: FrameType | None) -> bool:
    """Whether ``frame`` is ``outer``, or was called from it."""
    while frame is not None and frame is not outer:
        frame = frame.f_back
    return frame is outer
