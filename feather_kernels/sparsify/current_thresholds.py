"""Keeps a model's thresholds in step with the weights it uses."""

from __future__ import annotations

import copy
import itertools
import logging
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from feather_kernels.nn.base import SparseLayer, WeightVersion
from feather_kernels.sparsify.forward_cleanup import ForwardCleanup
from feather_kernels.sparsify.functional_calls import lend, plain_weights
from feather_kernels.sparsify.layer_swap import uses_of
from feather_kernels.sparsify.missing_steps import MissingStepWatch
from feather_kernels.sparsify.model_changes import LayerPlaces, check_whole
from feather_kernels.sparsify.schedule_position import SchedulePosition, select_at
from feather_kernels.sparsify.weight_memory import checksum, has_memory
from feather_kernels.torch_private import constant_for_compilers, in_backward, in_transform, is_fake, tracing

if TYPE_CHECKING:
    from feather_kernels.nn.thresholds import Thresholds
    from feather_kernels.sparsify.policies import Policy
    from feather_kernels.sparsify.prunable import PrunableWeight
    from feather_kernels.sparsify.unused_layers import UnusedLayerWatch

_log = logging.getLogger("feather_kernels")
_STALE_TRACE = (
    "the weights have changed since the thresholds were selected, and a trace would hold both: call the model once, or "
    "Sparsifier.refresh(), before it is traced or exported; or finalize() a copy and export that"
)


class CurrentThresholds:
    """Selects the thresholds of one model: in every step, and before a forward pass if the weights have changed.

    It is a forward pre-hook of the model. Weights are compared by object, address and torch's count of in-place writes
    (``load_state_dict``, a broadcast, an average's update, an optimizer that swaps weights for evaluation); a change
    between ``train()`` and ``eval()`` selects anew in any case. A functional call on other weights, also inside a
    transform of torch.func, gets thresholds of these weights for itself. The hook does nothing inside compiled code,
    CUDA graph capture or a backward pass, for sharded weights, and for thresholds in shared memory, which belong to
    another process. It raises where a sparse layer is no longer part of the model.

    A deep copy of the model copies its hook, which then selects from the weights of the copy at the same position of
    the schedule; while its weights are those that were copied, it keeps its thresholds. A pickled model keeps the
    sparsity of the moment.

    Args:
        model: the model.
        weights: its prunable weights.
        policy: how much each weight loses.
        position: where the schedule stands.
        thresholds: what the layers read.
    """

    def __init__(
        self,
        model: nn.Module,
        weights: list[PrunableWeight],
        policy: Policy,
        position: SchedulePosition,
        thresholds: Thresholds,
    ) -> None:
        self.weights = weights
        self.places = LayerPlaces(model, weights)
        self.policy: Policy | None = policy
        self.position = position
        self.thresholds = thresholds
        self.restored = False  # by load_state_dict: they stay until the next step
        self._training: bool | None = None  # of the model, in its last forward
        self._copied_current = False
        self._copied_bytes: Tensor | None = None  # a checksum, of a copy
        self._reset()

    def _reset(self) -> None:
        """Clear what depends on where the weights live; a copy finds it again."""
        self._uses = uses_of(self.weights)
        counts = itertools.accumulate(len(weight.uses) for weight in self.weights)
        self._firsts = [0, *counts][:-1]  # the first use of each weight
        self._places: Sequence[tuple[Any, ...]] = []
        self._versions: list[WeightVersion] | None = None
        self._as_copied = False
        self._ran = False
        self._looked_at = -1  # the step count at which the bytes were last known to be those selected from
        self.watch: UnusedLayerWatch | None = None
        self.step_watch = MissingStepWatch()
        self._forward_cleanup = ForwardCleanup()

    @property
    def position(self) -> SchedulePosition:
        """Where the schedule stands; it knows all hooks that follow it."""
        return self._position

    @position.setter
    def position(self, position: SchedulePosition) -> None:
        self.forget_position()
        self._position = position
        position.followers.add(self)

    def forget_position(self) -> None:
        """Let no step of the schedule select for this model any more."""
        if "_position" in self.__dict__:
            self._position.followers.discard(self)

    # ------------------------------------------------------------------------------------------------ selection

    def select(self, *, unseen: bool = False) -> None:
        """Set the thresholds from the weights as they are, at the position of the schedule; nothing read on the host.

        ``unseen``: as in ``Thresholds.assign``.

        Raises:
            RuntimeError: a weight is gone, has another shape, is no longer tied, or holds no values (FakeTensorMode).
        """
        if self.policy is None:
            raise RuntimeError("a model that was pickled with a scope that is a function cannot select thresholds")
        self._select(self._check_places(), unseen)

    def _select(self, parameters: Sequence[Tensor], unseen: bool = False) -> None:
        assert self.policy is not None
        with torch.inference_mode(False), torch.no_grad():
            values = self._per_use(select_at(self.position, self.policy, parameters))
            self.thresholds.assign(values, self._scales(values, self.policy), unseen=unseen)
        self._versions = [WeightVersion.of(use.latent) for use in self._uses]
        self._looked_at = self.position.advances
        self._as_copied = self.restored = False
        self.thresholds.followed = True

    def step(self, model: nn.Module, skipped: Tensor | None) -> None:
        """One optimizer step further, unless it was ``skipped``; for copies too whose hook has never run.

        Their forward may be compiled, and then their hook never runs. What raises leaves the position where it was.
        """
        self._forward_cleanup.clean(sys._getframe())
        self.places.check(model)
        parameters = self._check_places()
        if self.watch is not None and self.watch.step():
            self.stop_watching()
        self.position.advance(skipped)
        self.step_watch.step()
        self._select(parameters)
        for copied in list(self.position.followers):
            if copied is not self and not copied._ran:
                copied._select_unasked()

    def _select_unasked(self) -> None:
        try:
            self.refresh_if_stale()
        except (RuntimeError, ValueError):  # of a copy that was changed: its own forward raises it
            self._ran = True

    def stop_watching(self) -> None:
        """End the watch over the first training step."""
        self._forward_cleanup.clean(sys._getframe())
        if self.watch is not None:
            self.watch.stop()
            self.watch = None

    def _check_places(self) -> Sequence[Tensor]:
        """The weights; runs the full checks only if an object, address or shape has changed since the last step."""
        if is_fake(self.weights[0].parameter):
            raise RuntimeError("thresholds cannot be selected under FakeTensorMode, whose tensors hold no values")
        held = self._held()
        places = [(-1,) if w is None else (id(w), w.data_ptr(), w.shape) for w in held]
        if places != self._places:
            self._check_weights()
            for use in self._uses:
                use.binding.follow(use.latent)
            self.thresholds.keep_only({use.binding.key for use in self._uses})
            self._places = places
        if len(held) == len(self.weights):
            return cast("Sequence[Tensor]", held)
        return [weight.parameter for weight in self.weights]

    def _held(self) -> Sequence[Tensor | None]:
        """What each layer holds as its weight at this moment."""
        return [use.module._parameters.get(use.parameter_name) for use in self._uses]

    def check_model(self, model: nn.Module) -> None:
        """Raise RuntimeError unless the layers are part of ``model`` and hold their whole weights."""
        self.places.check(model)
        self._check_weights()

    def _check_weights(self) -> None:
        assert self.policy is not None
        for weight, shape in zip(self.weights, self.policy.shapes, strict=True):
            check_whole(weight.name, weight.parameter, shape)

    def _per_use(self, values: Tensor) -> Tensor:
        """(L,) thresholds, one per distinct weight -> one per use of a weight."""
        if len(self._uses) == len(self.weights):
            return values
        counts = [len(weight.uses) for weight in self.weights]
        return torch.cat([value.expand(count) for value, count in zip(values.split(1), counts, strict=True)])

    def _scales(self, like: Tensor, policy: Policy) -> Tensor | None:
        """(uses,) gradient scales to write, in dtype and on the device of ``like``; None where they do not change."""
        if not self.thresholds.scales_change or like.device.type == "meta":
            return None
        return self._per_use(policy.with_own_grad_scales(self.position.grad_scale(like.device), like))

    # ------------------------------------------------------------------------------------------------ the hook

    def __call__(self, module: nn.Module, _args: tuple[Any, ...]) -> None:
        """Before a forward of the model: select if the weights, or the mode, have changed."""
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting():
                _check_export(self)
            return
        self.places.check(module)
        self.thresholds.followed = self._ran = True
        switched = self._training is not None and self._training != module.training
        current = self.restored or (self.is_current() and self._has_the_bytes(switched))
        if not current and module.training and torch.is_grad_enabled():
            self.step_watch.weights_changed()
        undo: list[Callable[[], None]] = []
        if current and (self.restored or not switched or self._as_copied):
            settled = True
        elif self._is_functional_call():
            undo, settled = self._lend(switched), False
        else:
            settled = self._refresh(current)
        if settled or self._training is None:
            self._training = module.training
        if self.watch is not None:
            undo += self.watch.forward_begins(module)
        self._forward_cleanup.begin(sys._getframe(1), undo)

    def forward_ended(self, *_: Any) -> None:
        """The forward hook of the model, also after an exception."""
        if not torch.compiler.is_compiling():
            self._forward_cleanup.end()

    def refresh_if_stale(self) -> None:
        """Select if the weights have changed and nothing forbids it."""
        if not (self.restored or self.is_current() or self._is_functional_call()):
            self._refresh()

    def _refresh(self, current: bool = False) -> bool:
        """Select, though torch may tell that the weights are ``current``; False where that must wait."""
        if self._must_wait():
            return False
        if tracing():
            if current:
                return False  # a mere change of mode; the next forward outside of the trace looks again
            raise RuntimeError(_STALE_TRACE)
        if self.policy is None:
            _log.warning("a model pickled with a scope that is a function keeps the thresholds it was pickled with")
            self.restored = True
            return True
        self.select(unseen=current)
        return True

    def _is_functional_call(self) -> bool:
        """Whether the layers hold other tensors than Parameters with memory of their own, or a transform runs."""
        return in_transform() or not all(map(has_memory, self._held()))

    def _must_wait(self) -> bool:
        if in_backward() or self.thresholds.is_shared():
            return True
        return self.weights[0].parameter.is_cuda and torch.cuda.is_current_stream_capturing()

    def _lend(self, switched: bool) -> list[Callable[[], None]]:
        """Thresholds, for this forward alone, of weights that are not the model's own or cannot be written for here."""
        weights = plain_weights(self._held())
        if weights is None or self._must_wait() or self.policy is None or (not switched and self._are_own(weights)):
            return []
        policy, distinct = self.policy, [weights[index] for index in self._firsts]
        bindings = [use.binding for use in self._uses]
        own = [binding.value.data_ptr() for binding in bindings]
        lent, give_back = lend(bindings, lambda: self._per_use(select_at(self.position, policy, distinct)))
        if self.watch is not None:
            self.watch.stands_for.update(zip([value.data_ptr() for value in lent], own, strict=True))
        return [give_back]

    def _are_own(self, weights: Sequence[Tensor]) -> bool:
        """Whether these are views of the weights that the thresholds were selected from, with the same values."""
        versions = self._versions or ()
        return len(versions) == len(weights) and all(
            version.describes_memory_of(weight) for version, weight in zip(versions, weights, strict=True)
        )

    def check_export(self) -> None:
        """Raise RuntimeError if an exporter would record thresholds of other weights than the model has now."""
        versions = self._versions_of_copy() if self._versions is None else self._versions
        if self.restored or (len(versions) == len(self._uses) and all(version.still_holds() for version in versions)):
            return
        raise RuntimeError(_STALE_TRACE)

    def is_current(self) -> bool:
        """Whether the weights are, as far as torch tells, those that the thresholds were selected from."""
        if self._versions is None:
            self._versions = self._versions_of_copy()
            self._as_copied = bool(self._versions)
        if len(self._versions) != len(self._uses):
            return False
        for version, parameter in zip(self._versions, self._held(), strict=True):
            if parameter is None or not version.still_describes(parameter):
                return False
        return True

    def _has_the_bytes(self, switched: bool) -> bool:
        """For a copy, after every step of the model and change of mode, whether it has the bytes selected from.

        An average may be written through ``.data``, which counts no version.
        """
        now = self.position.advances
        seen = self._looked_at == now and not (switched and self._as_copied)
        if self._copied_bytes is None or seen or self._must_wait() or in_transform() or tracing():
            return True
        self._looked_at = now
        if self._as_copied:  # a snapshot keeps its thresholds
            bytes_now = checksum(self._held())
            self._as_copied = bytes_now is None or bool((bytes_now.cpu() == self._copied_bytes.cpu()).all())
        return self._as_copied

    def _versions_of_copy(self) -> list[WeightVersion]:
        """The weights that came with the thresholds, if this is part of a copy that was current when it was made."""
        if not self._copied_current:
            return []
        copied = [cast("SparseLayer", use.module).feather.copied.get(use.parameter_name) for use in self._uses]
        return [version for version in copied if version is not None]

    # ------------------------------------------------------------------------------------------------ copies

    def __getstate__(self) -> dict[str, Any]:
        policy = None if self.policy is None or callable(self.policy.scope) else self.policy
        return {**self._state_of_copy(), "policy": policy}  # a function may not pickle

    def __setstate__(self, state: dict[str, Any]) -> None:
        position = state.pop("position")
        self.__dict__.update(state)
        self._reset()
        self.position = position

    def __deepcopy__(self, memo: dict[int, Any]) -> CurrentThresholds:
        twin = memo[id(self)] = CurrentThresholds.__new__(CurrentThresholds)
        twin.__setstate__(copy.deepcopy(self._state_of_copy(), memo))
        return twin

    def _state_of_copy(self) -> dict[str, Any]:
        names = ("weights", "places", "policy", "position", "thresholds", "_training")
        kept = self.restored or self.is_current()
        copied = {"restored": False, "_copied_current": kept, "_copied_bytes": checksum(self._held())}
        return {**{name: getattr(self, name) for name in names}, **copied}


@constant_for_compilers
def _check_export(hook: CurrentThresholds) -> None:
    hook.check_export()


def hooks_of(model: nn.Module) -> list[CurrentThresholds]:
    """What selects the thresholds of ``model`` and of modules inside it."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return [hook for hook in hooks if isinstance(hook, CurrentThresholds)]
