"""Warns if training changes the weights while nobody steps the sparsifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

from feather_kernels.user_warnings import warn_user

if TYPE_CHECKING:
    from feather_kernels.sparsify.optimizer_hook import OptimizerHook

PATIENCE = 100  # forwards before the warning; some optimizers call the model many times per step


class MissingStepWatch:
    """Counts the training forwards that find changed weights since the last step.

    Attributes:
        optimizer_hook: the hook of the sparsifier on its optimizer; None without ``attach()``.
    """

    def __init__(self) -> None:
        self.optimizer_hook: OptimizerHook | None = None
        self._stepped = False
        self._changes = 0

    def step(self) -> None:
        """Note that the sparsifier has stepped."""
        self._stepped, self._changes = True, 0

    def weights_changed(self) -> None:
        """Note that a training forward has found changed weights; warn if that happens too often without a step."""
        self._changes += 1
        if self._changes != PATIENCE:
            return
        fact = f"the weights have changed before {PATIENCE} training forwards, but"
        if self.optimizer_hook is not None and self.optimizer_hook.used:
            warn_user(
                f"{fact} the optimizer that the sparsifier is attached to has not stepped: attach() the optimizer that "
                "does, or call step() yourself"
            )
        elif not self._stepped:
            warn_user(
                f"{fact} Sparsifier.step() has not been called, so the sparsity does not rise: call it after every "
                "optimizer.step(), or attach() the optimizer"
            )
