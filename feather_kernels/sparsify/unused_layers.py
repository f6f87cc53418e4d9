"""Watches the first training step for weights that get a gradient though no forward has called their layer."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from feather_kernels.ops.call_record import CallRecord
from feather_kernels.sparsify.direct_reads import DirectReads
from feather_kernels.torch_private import has_compiled_parts, tracing

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from feather_kernels.sparsify.prunable import WeightUse


class UnusedLayerWatch:
    """Notes which layers training forwards call, and which weights get a gradient without such a call.

    The watch ends when training forwards have called every layer. Until the first step it also looks for operations on
    the Parameters themselves (``DirectReads``).

    A training forward is a forward of the model in training mode with grad mode on. If there is none, the model is
    assumed to train in ``eval()`` mode. Calls that bypass the model (compiled code, single submodules) count as
    training. A weight in the form "attribute" may get a gradient without a call, since its attribute returns P(weight).

    Args:
        uses: all uses of the prunable weights.

    Attributes:
        stands_for: addresses of lent thresholds, mapped to those of the layers' own thresholds.
    """

    def __init__(self, uses: Sequence[WeightUse]) -> None:
        self._uses = list(uses)
        self._in_evaluation: set[int] = set()
        self._trained = False  # whether there was a training forward
        self._record = CallRecord()
        self._record.start()
        self.stands_for: dict[int, int] = {}
        self._with_gradient: set[int] = set()  # indices of uses
        self._handles = _notice_gradients(self._uses, self._with_gradient)
        self._reads: DirectReads | None = DirectReads(self._uses)
        self._entered = threading.local()
        self._end = weakref.finalize(self, _stop, self._record, self._handles)

    # ------------------------------------------------------------------------------------------------ forwards

    def forward_begins(self, model: nn.Module) -> list[Callable[[], None]]:
        """Called before each eager forward of the model; returns the cleanups to call at its end."""
        if not self._end.alive or getattr(self._entered, "running", False):
            return []
        self._entered.running = True
        undo = [self._forward_ends]
        if not (model.training and torch.is_grad_enabled()):
            self._record.redirect(self._in_evaluation if torch.is_grad_enabled() else set())
            return undo
        self._trained = True
        if self._reads is not None and not tracing() and not has_compiled_parts(model):
            self._reads.begin()
            self._reads.__enter__()
            undo.append(self._reads.leave)
        return undo

    def _forward_ends(self) -> None:
        self._entered.running = False
        self._record.redirect(None)

    # ------------------------------------------------------------------------------------------------ steps

    def step(self) -> bool:
        """Called in each step; returns whether training has called all layers, which ends the watch.

        Raises:
            RuntimeError: weights got a gradient though no training forward has called their layers.
        """
        seen = self._record.addresses
        seen |= {self.stands_for[address] for address in seen & self.stands_for.keys()}
        self.stands_for.clear()  # other tensors may get these addresses
        if not self._trained:
            seen = seen | self._in_evaluation
        if not seen and not self._with_gradient:
            return False
        missing = {
            index
            for index, use in enumerate(self._uses)
            if use.latent.numel() and use.binding.value.data_ptr() not in seen
        }
        called = {use.latent for index, use in enumerate(self._uses) if index not in missing}  # tied: one is enough
        bypassed = [self._uses[index] for index in sorted(missing & self._with_gradient)]
        bypassed = [use for use in bypassed if use.form != "attribute" and use.latent not in called]
        if bypassed:
            raise RuntimeError(
                "no training forward has called these sparse layers, but their weights get a gradient: "
                f"{', '.join(_describe(use) for use in bypassed)}. Either some module reads the weights without "
                "calling the layers, which trains them dense, or the loss has a term over all Parameters: name the "
                "layers in read_directly=[...], or in ignore=[...]"
            )
        self._reads = None
        if missing:
            return False
        self.stop()
        return True

    def stop(self) -> None:
        """End the watch; may be called again."""
        self._end()


def _notice_gradients(uses: Sequence[WeightUse], found: set[int]) -> list[RemovableHandle]:
    """Add the index of each use whose Parameter gets a gradient to ``found``.

    It uses hooks, because ``zero_grad()`` may delete the gradients before anyone looks.
    """

    def hook(index: int) -> Callable[[Tensor], None]:
        return lambda _: found.add(index)

    latents = [(index, use.latent) for index, use in enumerate(uses)]
    return [
        parameter.register_post_accumulate_grad_hook(hook(index))
        for index, parameter in latents
        if parameter.requires_grad and parameter.is_leaf
    ]


def _stop(record: CallRecord, handles: Sequence[RemovableHandle]) -> None:
    record.stop()
    for handle in handles:
        handle.remove()


def _describe(use: WeightUse) -> str:
    """The name of the layer, and the function that replaces its forward, if any."""
    wrapper = use.module.__dict__.get("forward")
    if wrapper is None:
        return use.name
    return f"{use.name} (whose forward is {getattr(wrapper, '__qualname__', repr(wrapper))})"
