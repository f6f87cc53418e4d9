"""Keeps a model's thresholds in step with the weights it uses."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import Parameter

from feather_kernels.nn.base import SparseLayer, WeightVersion
from feather_kernels.nn.thresholds import Thresholds
from feather_kernels.sparsify.policies import Policy
from feather_kernels.sparsify.position import SchedulePosition
from feather_kernels.sparsify.selection import PrunableWeight
from feather_kernels.torch_private import in_backward, in_transform, is_fake, tracing

_log = logging.getLogger("feather_kernels")


class CurrentThresholds:
    """Selects the thresholds of one model: in every step, and before a forward pass if the weights have changed.

    It is a forward pre-hook of the model. Weights are compared by object, address and torch's count of in-place writes
    (``load_state_dict``, a broadcast, an average's update, an optimizer that swaps weights for evaluation); a change
    between ``train()`` and ``eval()`` selects anew in any case. The hook does nothing inside compiled code, CUDA graph
    capture, torch.func transforms or a backward pass, for weights that are not Parameters with memory of their own
    (functional calls, sharded weights), and for thresholds in shared memory, which belong to another process.

    A deep copy of the model copies its hook, which then selects from the weights of the copy at the same position of
    the schedule; while its weights are those that were copied, it keeps its thresholds. A pickled model keeps the
    sparsity of the moment.

    Args:
        weights: the prunable weights of the model.
        policy: how much each weight loses.
        position: where the schedule stands.
        thresholds: what the layers read.
    """

    def __init__(
        self, weights: list[PrunableWeight], policy: Policy, position: SchedulePosition, thresholds: Thresholds
    ) -> None:
        self.weights = weights
        self.policy: Policy | None = policy
        self.position = position
        self.thresholds = thresholds
        self.restored = False  # by load_state_dict: they stay until the next step
        self._training: bool | None = None  # of the model, in its last forward
        self._copied_current = False
        self._reset()

    def _reset(self) -> None:
        """Clear what depends on where the weights live; a copy finds it again."""
        self._uses = [use for weight in self.weights for use in weight.uses]
        self._places: Sequence[tuple[int, torch.Size | None]] = []
        self._versions: list[WeightVersion] | None = None
        self._as_copied = False

    @property
    def forward_ran(self) -> bool:
        """Whether a forward of the model has been seen."""
        return self._training is not None

    # ------------------------------------------------------------------------------------------------ selection

    def select(self, *, unseen: bool = False) -> None:
        """Set the thresholds from the weights as they are, at the position of the schedule; nothing read on the host.

        ``unseen``: as in ``Thresholds.assign``.

        Raises:
            RuntimeError: a weight is gone, has another shape, is no longer tied, or holds no values (FakeTensorMode).
        """
        if self.policy is None:
            raise RuntimeError("a model that was pickled with a scope that is a function cannot select thresholds")
        if is_fake(self.weights[0].parameter):
            raise RuntimeError("thresholds cannot be selected under FakeTensorMode, whose tensors hold no values")
        parameters = self._check_places()
        with torch.inference_mode(False), torch.no_grad():
            values = self._per_use(_select(parameters, self.policy, self.position))
            self.thresholds.assign(values, self._scales(values, self.policy), unseen=unseen)
        self._versions = [WeightVersion.of(use.latent) for use in self._uses]
        self._as_copied = self.restored = False
        self.thresholds.followed = True

    def _check_places(self) -> Sequence[Tensor]:
        """The weights; runs the full checks only if an address or a shape has changed since the last step."""
        held = self._held()
        places = [(-1, None) if w is None else (w.data_ptr(), w.shape) for w in held]
        if places != self._places:
            self._check_weights()
            for use in self._uses:
                use.binding.follow(use.latent)
            self.thresholds.keep_only({use.binding.key for use in self._uses})
            self._places = places
        if len(held) == len(self.weights):
            return cast(Sequence[Tensor], held)
        return [weight.parameter for weight in self.weights]

    def _held(self) -> Sequence[Tensor | None]:
        """What each layer holds as its weight at this moment."""
        return [use.module._parameters.get(use.parameter_name) for use in self._uses]

    def _check_weights(self) -> None:
        assert self.policy is not None
        for weight, shape in zip(self.weights, self.policy.shapes, strict=True):
            got = tuple(weight.parameter.shape)
            if got != shape:
                raise RuntimeError(
                    f"the weight of {weight.name} had shape {shape} when the model was made sparse, now {got}: make "
                    "the model sparse after its layers have their final shapes"
                )

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
            return
        self.thresholds.followed = True
        switched = self._training is not None and self._training != module.training
        if self.refresh_if_stale(switched) or self._training is None:
            self._training = module.training

    def refresh_if_stale(self, switched: bool = False) -> bool:
        """Select if the weights have changed, or the mode has ``switched``; False where that must wait."""
        current = self.is_current()
        if self.restored or (current and (not switched or self._as_copied)):
            return True
        if not all(map(_has_memory, self._held())) or in_backward() or in_transform() or self.thresholds.is_shared():
            return False
        if self.weights[0].parameter.is_cuda and torch.cuda.is_current_stream_capturing():
            return False
        if tracing():
            raise RuntimeError(
                "the weights have changed since the thresholds were selected, and a trace would hold both: call the "
                "model once, or Sparsifier.refresh(), before it is traced"
            )
        if self.policy is None:
            _log.warning("a model pickled with a scope that is a function keeps the thresholds it was pickled with")
            self.restored = True
            return True
        self.select(unseen=current)
        return True

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

    def _versions_of_copy(self) -> list[WeightVersion]:
        """The weights that came with the thresholds, if this is part of a copy that was current when it was made."""
        if not self._copied_current:
            return []
        copied = [cast(SparseLayer, use.module).feather.copied.get(use.parameter_name) for use in self._uses]
        return [version for version in copied if version is not None]

    # ------------------------------------------------------------------------------------------------ copies

    def __getstate__(self) -> dict[str, Any]:
        policy = None if self.policy is None or callable(self.policy.scope) else self.policy
        return {**self._state_of_copy(), "policy": policy}  # a function may not pickle

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> CurrentThresholds:
        twin = memo[id(self)] = CurrentThresholds.__new__(CurrentThresholds)
        twin.__setstate__(copy.deepcopy(self._state_of_copy(), memo))
        return twin

    def _state_of_copy(self) -> dict[str, Any]:
        names = ("weights", "policy", "position", "thresholds", "_training")
        kept = self.restored or self.is_current()
        return {**{name: getattr(self, name) for name in names}, "restored": False, "_copied_current": kept}


def hooks_of(model: nn.Module) -> list[CurrentThresholds]:
    """What selects the thresholds of ``model`` and of modules inside it."""
    hooks = [hook for module in model.modules() for hook in module._forward_pre_hooks.values()]
    return [hook for hook in hooks if isinstance(hook, CurrentThresholds)]


def _has_memory(parameter: Tensor | None) -> bool:
    """Whether this is a Parameter whose memory holds its values; not a sharded, functional or other wrapper."""
    return isinstance(parameter, Parameter) and not hasattr(parameter, "__tensor_flatten__")


def _select(parameters: Sequence[Tensor], policy: Policy, position: SchedulePosition) -> Tensor:
    """(L,) thresholds of the weights; 0 for weights without data (meta device)."""
    first = parameters[0]
    devices = {parameter.device for parameter in parameters}
    if len(devices) > 1:
        raise ValueError(f"the prunable weights must be on one device, got {sorted(map(str, devices))}")
    if first.device.type == "meta":
        return policy.no_thresholds(first)
    if position.device_schedule is not None:
        ranks, fractions, _ = position.device_schedule.now()
        return policy.thresholds(parameters, ranks.to(first.device), fractions.to(first.device))
    return policy.thresholds_at(list(parameters), position.sparsity)
