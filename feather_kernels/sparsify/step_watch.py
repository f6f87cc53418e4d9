"""Notices a training in which the weights move and nobody steps the sparsifier."""

from __future__ import annotations

import warnings

from feather_kernels.errors import SparsityWarning

_OUTSIDE = 7  # frames from here to the caller of the model


class StepWatch:
    """Counts the training forwards that find the weights changed since the last step.

    Attributes:
        attached: whether an optimizer is to step.
    """

    def __init__(self) -> None:
        self.attached = False
        self._stepped = False
        self._changes = 0

    def step(self) -> None:
        """The sparsifier has stepped."""
        self._stepped, self._changes = True, 0

    def weights_changed(self) -> None:
        """A training forward has found other weights than the last one; warns if that goes on without a step."""
        self._changes += 1
        if self.attached and self._changes == 3:
            warnings.warn(
                "the weights have changed before 3 training forwards in a row, but the optimizer that the sparsifier "
                "is attached to has not stepped: attach() to the optimizer that does, or call step() yourself",
                SparsityWarning,
                stacklevel=_OUTSIDE,
            )
        if not self.attached and not self._stepped and self._changes == 100:
            warnings.warn(
                "the weights have changed before 100 training forwards, but Sparsifier.step() has not been called: the "
                "sparsity stays where the schedule begins. Call it after every optimizer.step(), or attach() it",
                SparsityWarning,
                stacklevel=_OUTSIDE,
            )
