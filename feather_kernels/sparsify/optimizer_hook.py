"""A hook on the optimizer, which steps the sparsifier after every step of the optimizer."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

from feather_kernels.torch_private import outside_compilers

if TYPE_CHECKING:
    from torch import Tensor
    from torch.utils.hooks import RemovableHandle

    from feather_kernels.sparsify.prunable import PrunableWeight

# where wrappers keep the optimizer: accelerate and Lightning, SAM, opacus, torch's PostLocalSGDOptimizer
WRAPPED = ("optimizer", "base_optimizer", "original_optimizer", "optim")


class OptimizerHook:
    """The hook of a sparsifier on its optimizer, if ``attach()`` was called; copies have none."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def add(
        self, optimizer: Any, weights: Sequence[PrunableWeight], advance: Callable[[Tensor | None], None]
    ) -> RemovableHandle:
        """Hook the optimizer.

        Args:
            optimizer: the optimizer, or a wrapper around it.
            weights: the prunable weights, of which the optimizer must hold one.
            advance: called after each step with ``found_inf``: the tensor in which a GradScaler says that the optimizer
                has skipped the step, or None.

        Raises:
            TypeError, ValueError, RuntimeError: see ``Sparsifier.attach``.
        """
        innermost = unwrap(optimizer)
        _check_optimizer(innermost, weights)
        if self.active:
            raise RuntimeError(
                "the sparsifier is attached already: remove() the handle that the first attach() returned"
            )

        @outside_compilers
        def after_step(stepped: Optimizer, *_: Any) -> None:
            if not _is_nested(stepped, sys._getframe(1)):
                advance(getattr(stepped, "found_inf", None))  # set if the optimizer itself skips the step

        self._handles = [innermost.register_step_post_hook(after_step)]
        return self._handles[0]

    @property
    def used(self) -> bool:
        """Whether the hook was added and not removed, even if the optimizer has been deleted."""
        hooks = [handle.hooks_dict_ref() for handle in self._handles]
        return any(hook is None or handle.id in hook for hook, handle in zip(hooks, self._handles, strict=True))

    @property
    def active(self) -> bool:
        """Whether the hook is on an optimizer that still exists."""
        return any(handle.id in (handle.hooks_dict_ref() or ()) for handle in self._handles)

    def remove(self) -> None:
        """Remove the hook."""
        for handle in self._handles:
            handle.remove()

    def __getstate__(self) -> dict[str, Any]:
        return {"_handles": []}


def _is_nested(optimizer: Optimizer, frame: FrameType | None) -> bool:
    """Whether this step of the optimizer runs inside another one: torch runs hooks for ``super().step()`` too."""
    calls = 0
    while frame is not None:
        around = frame.f_code.co_filename == Optimizer.__init__.__code__.co_filename  # torch's wrapper of step
        calls += around and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return calls > 1


def unwrap(optimizer: Any) -> Any:
    """The optimizer inside wrappers that hold it under one of the names in ``WRAPPED``."""
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
        raise ValueError("optimizer must hold a prunable weight of the model, got one without")
