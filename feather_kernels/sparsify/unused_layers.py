"""Watches the first training step for weights that train without their layer's forward."""

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
    """Notices which layers run in training forwards, and which weights get a gradient without that.

    Up to the first step it also looks for operations on the Parameters themselves; layers are waited for until all have
    run.

    A training forward is one of the model in training mode with grad mode on. A model that never has one is taken to
    be trained in ``eval()`` mode; calls that bypass the model (compiled code, submodules alone) count as training. A
    layer in the form "read" may get a gradient without a call: its attribute gives the sparse weight.
    """

    def __init__(self, uses: Sequence[WeightUse]) -> None:
        self._uses = list(uses)
        self._in_evaluation: set[int] = set()
        self._trained = False  # whether there was a training forward
        self._record = CallRecord()
        self._record.start()
        self.stands_for: dict[int, int] = {}  # addresses of thresholds: lent for one forward -> the layer's own
        self._with_gradient: set[int] = set()  # indices of uses
        self._handles = _notice_gradients(self._uses, self._with_gradient)
        self._reads: DirectReads | None = DirectReads(self._uses)
        self._entered = threading.local()
        self._end = weakref.finalize(self, _stop, self._record, self._handles)

    # ------------------------------------------------------------------------------------------------ forwards

    def forward_begins(self, model: nn.Module) -> list[Callable[[], None]]:
        """Called before each eager forward of the model; returns what is to be called at its end."""
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
        """Called in each step; whether all layers have run in training, so that the watch is over.

        Raises:
            RuntimeError: weights got a gradient though their layers have not run; it names them.
        """
        seen = self._record.addresses
        seen |= {self.stands_for[address] for address in seen & self.stands_for.keys()}
        self.stands_for.clear()  # other memory may get these addresses
        if not self._trained:
            seen = seen | self._in_evaluation
        if not seen and not self._with_gradient:
            return False
        missing = {
            index
            for index, use in enumerate(self._uses)
            if use.latent.numel() and use.binding.value.data_ptr() not in seen
        }
        called = {use.latent for index, use in enumerate(self._uses) if index not in missing}  # tied: one call will do
        bypassed = [self._uses[index] for index in sorted(missing & self._with_gradient)]
        bypassed = [use for use in bypassed if use.form != "attribute" and use.latent not in called]
        if bypassed:
            raise RuntimeError(
                "no training forward has called these sparse layers, but their weights get a gradient: "
                f"{', '.join(_describe(use) for use in bypassed)}. Either something reads the weights without calling "
                "the layers, which would train them dense, or the loss has a term over all Parameters: name the layers "
                "in read_directly=[...], or in ignore=[...]"
            )
        self._reads = None
        if missing:
            return False
        self.stop()
        return True

    def stop(self) -> None:
        """Watch no more; stopping twice is harmless."""
        self._end()


def _notice_gradients(uses: Sequence[WeightUse], found: set[int]) -> list[RemovableHandle]:
    """Note the index of each use whose Parameter gets a gradient; hooks, because ``zero_grad()`` may come first."""

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
    """The name, and the function that stands in the place of the layer's forward, if there is one."""
    wrapper = use.module.__dict__.get("forward")
    if wrapper is None:
        return use.name
    return f"{use.name} (whose forward is {getattr(wrapper, '__qualname__', repr(wrapper))})"
