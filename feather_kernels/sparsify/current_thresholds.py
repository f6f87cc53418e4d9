"""Keeps the thresholds of a model up to date with its weights."""

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
from feather_kernels.sparsify.distributed.layers import ShardedLayers
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
    from feather_kernels.sparsify.statistics import Statistics
    from feather_kernels.sparsify.unused_layers import UnusedLayerWatch

_log = logging.getLogger("feather_kernels")
_STALE_TRACE = (
    "the weights have changed since the thresholds were selected, so that a trace would record thresholds that do not "
    "fit: call the model once, or Sparsifier.refresh(), before it is traced or exported; or finalize() a copy and "
    "export that"
)


class CurrentThresholds:
    """Selects the thresholds of a model in every step, and before a forward pass if the weights have changed.

    It is a forward pre-hook of the model. It compares weights by object, address and torch's count of in-place writes,
    and so notices ``load_state_dict``, a broadcast, the update of an average, or an optimizer that swaps weights for
    evaluation. A change between ``train()`` and ``eval()`` always selects again. A functional call on other weights
    gets its own thresholds, even inside a transform of torch.func. The hook does nothing inside compiled code, CUDA
    graph capture or a backward pass, for sharded weights, and for thresholds in shared memory, which belong to another
    process. It raises if a sparse layer is no longer part of the model.

    A deep copy of the model copies its hook, which selects from the weights of the copy at the same position of the
    schedule. It keeps the copied thresholds as long as the copied weights do not change. A pickled model keeps the
    sparsity of its moment.

    Args:
        model: the model.
        weights: its prunable weights.
        policy: how the sparsity is divided among the weights.
        position: the position of the training in its schedule.
        thresholds: the thresholds that the layers read.

    Attributes:
        places: the paths from the model to the layers.
        restored: whether ``load_state_dict`` has set the thresholds, which stay until the next step then.
        watch: the watch over the first training step, until it ends.
        step_watch: the watch over trainings that never step.
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
        self.restored = False
        self._training: bool | None = None  # whether the model was in training mode in its last forward
        self._copied_current = False
        self._copied_bytes: Tensor | None = None  # in a copy, a checksum of the copied weights
        self._reset()

    def _reset(self) -> None:
        """Clear all state that depends on the memory of the weights; a copy starts without it."""
        self._uses = uses_of(self.weights)
        counts = itertools.accumulate(len(weight.uses) for weight in self.weights)
        self._firsts = [0, *counts][:-1]  # the first use of each weight
        self._places: Sequence[tuple[Any, ...]] = []
        self.shards = ShardedLayers(self.weights, self.places)
        self._versions: list[WeightVersion] | None = None
        self._as_copied = False
        self._ran = False
        self._looked_at = -1  # the count of steps when the weights were last known to be those selected from
        self.watch: UnusedLayerWatch | None = None
        self.step_watch = MissingStepWatch()
        self._forward_cleanup = ForwardCleanup()

    @property
    def position(self) -> SchedulePosition:
        """The position of the training in its schedule."""
        return self._position

    @position.setter
    def position(self, position: SchedulePosition) -> None:
        self.forget_position()
        self._position = position
        position.followers.add(self)

    def forget_position(self) -> None:
        """Stop selecting for this model in the steps of the schedule."""
        if "_position" in self.__dict__:
            self._position.followers.discard(self)

    # ------------------------------------------------------------------------------------------------ selection

    def select(self, *, unseen: bool = False) -> None:
        """Select the thresholds from the current weights at the current position, without waiting for the device.

        Args:
            unseen: as in ``Thresholds.assign``.

        Raises:
            RuntimeError: a weight is gone, has another shape, is no longer tied, or holds no values (FakeTensorMode).
        """
        if self.policy is None:
            raise RuntimeError("a model that was pickled with a scope function cannot select thresholds")
        self._select(self._check_places(), unseen)

    def _select(self, parameters: Sequence[Tensor], unseen: bool = False) -> None:
        assert self.policy is not None
        statistics = self.shards.statistics(parameters, self.policy, self.position)
        with torch.inference_mode(False), torch.no_grad():
            values = self._per_use(select_at(self.position, self.policy, *statistics))
            self.thresholds.assign(values, self._scales(values, self.policy), unseen=unseen)
        self._versions = [WeightVersion.of(use.latent) for use in self._uses]
        self._looked_at = self.position.advances
        self._as_copied = self.restored = False
        self.thresholds.followed = True

    def looked_at(self, model: nn.Module) -> tuple[Sequence[Tensor], Statistics]:
        """The weights, their thresholds up to date as far as that is possible here, and what can be asked of them.

        Sharded weights keep the thresholds that their forward keeps too.
        """
        self.check_model(model)
        self.refresh_if_stale()
        parameters = self._check_places() if self.shards.exist() else [weight.parameter for weight in self.weights]
        return parameters, self.shards.statistics(parameters, self.policy, self.position)[1]

    def step(self, model: nn.Module, skipped: Tensor | None) -> None:
        """Advance by one optimizer step and select; also for copies whose hook has never run (compiled forwards).

        If a check raises, the position has not moved; if a sum over processes fails, it has.

        Args:
            model: the model.
            skipped: as in ``SchedulePosition.advance``.
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
        except (RuntimeError, ValueError):  # the copy was changed: its own forward raises this
            self._ran = True

    def stop_watching(self) -> None:
        """End the watch over the first training step."""
        self._forward_cleanup.clean(sys._getframe())
        if self.watch is not None:
            self.watch.stop()
            self.watch = None

    def _check_places(self) -> Sequence[Tensor]:
        """Return the weights, after checks that run only if an object, address, shape or device has changed."""
        if is_fake(self.weights[0].parameter):
            raise RuntimeError("thresholds cannot be selected under FakeTensorMode, whose tensors hold no values")
        self.shards.take_back()
        held = self._held()
        places = [(-1,) if w is None else (id(w), w.data_ptr(), w.shape, w.device) for w in held]
        if places != self._places:
            self._check_weights()
            for use in self._uses:
                use.binding.follow(use.latent)
            self.thresholds.keep_only({use.binding.key for use in self._uses})
            self.shards.follow()
            self._places = places
        if len(held) == len(self.weights):
            return cast("Sequence[Tensor]", held)
        return [weight.parameter for weight in self.weights]

    def _held(self) -> Sequence[Tensor | None]:
        """The weight that each layer holds now."""
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
        """Repeat values (L,), one per weight, for each use of the weight: (uses,)."""
        if len(self._uses) == len(self.weights):
            return values
        counts = [len(weight.uses) for weight in self.weights]
        return torch.cat([value.expand(count) for value, count in zip(values.split(1), counts, strict=True)])

    def _scales(self, like: Tensor, policy: Policy) -> Tensor | None:
        """Gradient scales (uses,), with the dtype and device of ``like``; None if they do not change."""
        if not self.thresholds.scales_change or like.device.type == "meta":
            return None
        return self._per_use(policy.with_own_grad_scales(self.position.grad_scale(like.device), like))

    # ------------------------------------------------------------------------------------------------ the hook

    def __call__(self, module: nn.Module, _args: tuple[Any, ...]) -> None:
        """Before a forward of the model, select if the weights or the mode have changed."""
        if torch.compiler.is_compiling():
            if torch.compiler.is_exporting():
                _check_export(self)
            return
        self.places.check(module)
        self.thresholds.followed = self._ran = True
        switched = self._training is not None and self._training != module.training
        current = self.restored or (self.is_current() and self._has_the_bytes(switched))
        settled = current and (self.restored or not switched or self._as_copied)
        if not settled and self.shards.exist():
            self.shards.check()
            settled = current = True  # they stay: a forward must not wait for other processes
        if not current and module.training and torch.is_grad_enabled():
            self.step_watch.weights_changed()
        undo: list[Callable[[], None]] = []
        if not settled and self._is_functional_call():
            undo = self._lend(switched)
        elif not settled:
            settled = self._refresh(current)
        if settled or self._training is None:
            self._training = module.training
        if self.watch is not None:
            undo += self.watch.forward_begins(module)
        self._forward_cleanup.begin(sys._getframe(1), undo)

    def forward_ended(self, *_: Any) -> None:
        """The forward hook of the model, which runs after exceptions too."""
        if not torch.compiler.is_compiling():
            self._forward_cleanup.end()

    def refresh_if_stale(self) -> None:
        """Select if the weights have changed, unless that is impossible now."""
        if not (self.restored or self.is_current() or self.shards.exist() or self._is_functional_call()):
            self._refresh()

    def _refresh(self, current: bool = False) -> bool:
        """Select, even if torch says that the weights are ``current``; return False if that must wait."""
        if self._must_wait():
            return False
        if tracing():
            if current:
                return False  # only the mode has changed; the next forward outside of the trace looks again
            raise RuntimeError(_STALE_TRACE)
        if self.policy is None:
            _log.warning("a model that was pickled with a scope function keeps its pickled thresholds")
            self.restored = True
            return True
        self.select(unseen=current)
        return True

    def _is_functional_call(self) -> bool:
        """Whether a transform of torch.func runs, or the layers hold anything but Parameters with their own memory."""
        return in_transform() or not all(map(has_memory, self._held()))

    def _must_wait(self) -> bool:
        if in_backward() or self.thresholds.is_shared():
            return True
        return self.weights[0].parameter.is_cuda and torch.cuda.is_current_stream_capturing()

    def _lend(self, switched: bool) -> list[Callable[[], None]]:
        """Lend thresholds to this forward, for weights that are not the model's own; return the cleanups."""
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
        """Whether these are views of the weights from which the thresholds were selected, with the same values."""
        versions = self._versions or ()
        return len(versions) == len(weights) and all(
            version.describes_memory_of(weight) for version, weight in zip(versions, weights, strict=True)
        )

    def check_export(self) -> None:
        """Raise RuntimeError if an exporter would record thresholds that do not fit the weights."""
        versions = self._versions_of_copy() if self._versions is None else self._versions
        if self.restored or (len(versions) == len(self._uses) and all(version.still_holds() for version in versions)):
            return
        raise RuntimeError(_STALE_TRACE)

    def is_current(self) -> bool:
        """Whether, as far as torch can tell, the thresholds were selected from the current weights."""
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
        """Whether a copy still has the copied bytes; compared once per step and change of mode. True for originals.

        Averages may be written through ``.data``, which increases no version.
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
        """The versions of the copied weights, if this belongs to a copy of an up-to-date model."""
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
    """The hooks that select thresholds for ``model`` and for modules inside it."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return [hook for hook in hooks if isinstance(hook, CurrentThresholds)]
