"""The optimizer whose steps move a sparsifier."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from feather_kernels.sparsify.selection import PrunableWeight

# where wrappers keep the optimizer: accelerate and Lightning, SAM, opacus, torch's PostLocalSGDOptimizer
WRAPPED = ("optimizer", "base_optimizer", "original_optimizer", "optim")


class Attachment:
    """Hooks on the optimizers that a sparsifier follows; copies follow none."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def add(
        self, optimizer: Any, weights: Sequence[PrunableWeight], advance: Callable[[Tensor | None], None]
    ) -> Handles:
        """Call ``advance(found_inf)`` after each step of the innermost optimizer that ``optimizer`` wraps.

        ``found_inf`` is the tensor in which a GradScaler says that the optimizer has skipped its step, if there is one.

        Raises:
            TypeError, ValueError, RuntimeError: see ``Sparsifier.attach``.
        """
        innermost = unwrap(optimizer)
        _check_optimizer(innermost, weights)
        if self.active:
            raise RuntimeError("the sparsifier is attached already: remove() the handle of the first attach()")

        outermost = OutermostCall()

        def before_step(*_: Any) -> None:
            outermost.begin(sys._getframe(1))

        def after_step(stepped: Optimizer, *_: Any) -> None:
            if outermost.end(sys._getframe(1)):
                advance(getattr(stepped, "found_inf", None))  # set where the optimizer itself skips

        before = innermost.register_step_pre_hook(before_step)
        self._handles += [before, innermost.register_step_post_hook(after_step)]
        return Handles(before, self._handles[-1])

    @property
    def active(self) -> bool:
        """Whether an optimizer that still lives is attached."""
        return any(handle.id in (handle.hooks_dict_ref() or ()) for handle in self._handles)

    def remove(self) -> None:
        """Follow no optimizer any more."""
        for handle in self._handles:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {"_handles": []}


class Handles:
    """The hooks that follow an optimizer; ``remove()`` undoes them."""

    def __init__(self, *handles: RemovableHandle) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Follow the optimizer no longer."""
        for handle in self._handles:
            handle.remove()


class OutermostCall:
    """Tells the outermost of nested calls: torch's hooks run for ``step`` and for the ``super().step()`` in it."""

    def __init__(self) -> None:
        self._frame: FrameType | None = None

    def begin(self, frame: FrameType) -> None:
        """A call begins in ``frame``."""
        if self._frame is None or not _encloses(self._frame, frame):  # else it is nested, or one that raised
            self._frame = frame

    def end(self, frame: FrameType) -> bool:
        """Whether the call that ends in ``frame`` is the outermost."""
        if self._frame is not frame:
            return False
        self._frame = None
        return True


def _encloses(outer: FrameType, frame: FrameType | None) -> bool:
    while frame is not None and frame is not outer:
        frame = frame.f_back
    return frame is outer


def unwrap(optimizer: Any) -> Any:
    """The optimizer inside of wrappers that hold it as ``optimizer`` or ``base_optimizer``."""
    seen: list[Any] = []
    while not any(optimizer is one for one in seen):
        seen.append(optimizer)
        inner = (getattr(optimizer, name, None) for name in WRAPPED)
        optimizer = next((one for one in inner if one is not None and not callable(one)), optimizer)
    return seen[-1]


def _check_optimizer(optimizer: Any, weights: Sequence[PrunableWeight]) -> None:
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"optimizer must be a torch.optim.Optimizer, got {type(optimizer).__name__}")
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    if not any(weight.parameter in held for weight in weights):
        raise ValueError("optimizer must hold a prunable weight of the model, got one that holds none")
