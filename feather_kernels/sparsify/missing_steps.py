"""Notices a training in which the weights move and nobody steps the sparsifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

from feather_kernels.user_code import warn_user

if TYPE_CHECKING:
    from feather_kernels.sparsify.optimizer_hook import OptimizerHook

PATIENCE = 100  # training forwards; optimizers that call the model themselves take many of them for one step


class MissingStepWatch:
    """Counts the training forwards that find the weights changed since the last step.

    Attributes:
        attachment: the optimizers that are to step, if any.
    """

    def __init__(self) -> None:
        self.optimizer_hook: OptimizerHook | None = None
        self._stepped = False
        self._changes = 0

    def step(self) -> None:
        """The sparsifier has stepped."""
        self._stepped, self._changes = True, 0

    def weights_changed(self) -> None:
        """A training forward has found other weights than the last one; warns if that goes on without a step."""
        self._changes += 1
        if self._changes != PATIENCE:
            return
        what = f"the weights have changed before {PATIENCE} training forwards, but"
        if self.optimizer_hook is not None and self.optimizer_hook.used:
            warn_user(
                f"{what} the optimizer that the sparsifier is attached to has not stepped: attach() to the optimizer "
                "that does, or call step() yourself"
            )
        elif not self._stepped:
            warn_user(
                f"{what} Sparsifier.step() has not been called: the sparsity stays where the schedule begins. Call it "
                "after every optimizer.step(), or attach() it"
            )
