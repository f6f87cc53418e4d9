"""The sparsifier: makes a model's layers sparse and moves their thresholds along a schedule."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from feather_kernels.ops.schema import check_power
from feather_kernels.sparsify import layer_swap
from feather_kernels.sparsify.current_thresholds import CurrentThresholds, hooks_of
from feather_kernels.sparsify.device_schedule import DeviceSchedule
from feather_kernels.sparsify.goal_warnings import warn_of_frozen, warn_of_thawed, warn_unless_reached
from feather_kernels.sparsify.layer_choice import FilterFn, LayerChoice, choose_weights
from feather_kernels.sparsify.optimizer_hook import OptimizerHook
from feather_kernels.sparsify.options import (
    GradScale,
    check_dtypes,
    check_model,
    check_options,
    resolve_grad_scale,
)
from feather_kernels.sparsify.overrides import resolve_overrides
from feather_kernels.sparsify.policies import Policy, ScopeFunction
from feather_kernels.sparsify.report import Report, measure_layers
from feather_kernels.sparsify.schedule_position import SchedulePosition
from feather_kernels.sparsify.schedules import Schedule, final_sparsity, last_step, make_schedule, sparsity_at
from feather_kernels.sparsify.state import check_state, warn_of_schedule
from feather_kernels.sparsify.unused_layers import UnusedLayerWatch
from feather_kernels.torch_private import outside_compilers

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from feather_kernels.sparsify.layer_names import Target


class Sparsifier:
    """Sparse training with Feather (BMVC 2023, section 3).

    The constructor swaps the classes of the model's layers for sparse ones and sets the threshold of step 0; ``step()``
    after every ``optimizer.step()`` sets the next one. The model keeps its modules, Parameters and state_dict keys.
    ``finalize()`` writes the zeros into the weights and gives the plain layers back.

    Args:
        model: the module to train; it may itself be a layer.
        sparsity: final fraction of zeros among the prunable weights, in [0, 1).
        total_steps: number of optimizer steps of the training; gives ``CubicSchedule(sparsity, 0, total_steps // 2)``.
        schedule: a schedule of your own instead of ``sparsity``; if ``total_steps`` is given too, a schedule that ends
            short of its final sparsity is warned about.
        scope: "global" (one threshold for all), "layer", "erk", or ``f(weights, sparsity) -> thresholds``; see
            ``policies.Policy``, also for ``min_density`` and ``score_scale``.
        power: p of the thresholding operator, at least 1 or inf.
        grad_scale: factor of the gradient on pruned weights, at least 0; "auto" is 1 for a final sparsity of at most
            0.95 and 0.5 above it; or a function of the current sparsity.
        targets, ignore, filter_fn, min_numel, read_directly: which layers; see ``layer_choice.LayerChoice``.
        min_density: what every weight keeps at least, as a fraction of its elements.
        overrides: options of single layers, by name, ``re:`` pattern or class (names win): a dict with any of
            ``sparsity``, ``min_density``, ``power``, ``grad_scale``.
        score_scale: "none", "l2" or "fan".
        recompute: whether backward computes P(w) again (True; linear layers and convolutions) instead of keeping it
            from the forward pass (False). None keeps it where all P(w) together are at most 1 GiB, and where P(w) is
            narrower than the weight: under autocast a dense layer keeps a copy of the weight too.
        capturable: keep step, ranks and thresholds on the device, so that ``step()`` can be captured in a CUDA graph.

    Attributes:
        model: the model.
        weights: the prunable weights, one entry per distinct Parameter.
        skipped: layers that stay dense, with reasons.
        schedule: the schedule.

    Raises:
        ValueError: an argument is out of range, contradicts another, or leaves no layer to prune.
    """

    def __init__(
        self,
        model: nn.Module,
        sparsity: float | None = None,
        total_steps: int | None = None,
        schedule: Schedule | None = None,
        *,
        scope: str | ScopeFunction = "global",
        power: float = 3.0,
        grad_scale: GradScale = "auto",
        targets: Sequence[Target] | None = None,
        ignore: Sequence[Target] | None = None,
        filter_fn: FilterFn | None = None,
        min_numel: int = 0,
        read_directly: Sequence[Target] | None = None,
        min_density: float = 0.0,
        overrides: Mapping[Target, Mapping[str, Any]] | None = None,
        score_scale: str = "none",
        recompute: bool | None = None,
        capturable: bool = False,
    ) -> None:
        check_model(model)
        self.schedule = make_schedule(sparsity, total_steps, schedule)
        check_power(power)
        scale_at, self._scales_change = resolve_grad_scale(grad_scale, self.schedule)
        check_options(recompute, capturable, scope)
        self._choice = LayerChoice(targets, ignore, filter_fn, min_numel, read_directly)
        self.model = model
        self.weights, self.skipped, self._left_frozen = choose_weights(model, self._choice)
        if sum(weight.parameter.numel() for weight in self.weights) == 0:
            reasons = "".join(f"; {layer.name}: {layer.reason}" for layer in self.skipped)
            raise ValueError(f"model must have a prunable layer, got none{reasons}")
        check_dtypes(self.weights)
        settings = resolve_overrides(self.weights, overrides)
        final = final_sparsity(self.schedule)
        self._policy = Policy(self.weights, scope, min_density, score_scale, settings, final, captured=capturable)
        device_schedule = None
        if capturable:
            end = last_step(self.schedule, total_steps)
            device_schedule = DeviceSchedule(self._policy, self.schedule, end, scale_at, self.weights[0].parameter)
        self._position = SchedulePosition(self.schedule, scale_at, device_schedule)
        self._trainable_at_start = [weight for weight in self.weights if weight.parameter.requires_grad]
        self._ended: str | None = None
        self._final_report: Report | None = None
        self._optimizer_hook = OptimizerHook()
        self._total_steps = total_steps
        scale = scale_at(sparsity_at(self.schedule, 0))
        self._thresholds = layer_swap.make_sparse(self.weights, settings, power, scale, self._scales_change, recompute)
        self._current_thresholds = CurrentThresholds(
            model, self.weights, self._policy, self._position, self._thresholds
        )
        try:
            self._current_thresholds.select()
        except Exception:
            layer_swap.make_dense(self.weights)
            raise
        before = model.register_forward_pre_hook(self._current_thresholds)
        self._hooks = before, model.register_forward_hook(self._current_thresholds.forward_ended, always_call=True)
        self._current_thresholds.watch = UnusedLayerWatch(layer_swap.uses_of(self.weights))

    # ------------------------------------------------------------------------------------------------ training

    def step(self) -> None:
        """Advance the schedule by one optimizer step and set the thresholds for the next forward pass.

        Call it after ``optimizer.step()``. Reads nothing on the host. Past the end of the schedule the final sparsity
        is kept.

        Raises:
            RuntimeError: after ``finalize()`` or ``detach()``; while ``attach()`` counts the steps; if a sparse layer
                is no longer part of the model, or a weight has another shape or is sharded; if a weight got a gradient
                though no training forward has called its layer: some module reads it directly, which trains it dense.
        """
        self._check_live("step")
        if self._optimizer_hook.active:
            raise RuntimeError(
                "step() is called by the optimizer that the sparsifier is attached to, and would count each step "
                "twice: call it no more, or remove() the handle that attach() returned"
            )
        self._advance()

    @outside_compilers
    def _advance(self, found_inf: Tensor | None = None) -> None:
        """One optimizer step further; none if ``found_inf`` says that the optimizer has skipped it."""
        self._left_frozen = warn_of_thawed(self._left_frozen)
        if self._current_thresholds.watch is not None:
            trainable, self._trainable_at_start = self._trainable_at_start, []
            warn_of_frozen(trainable)
        if self._position.device_schedule is not None:
            self._position.device_schedule.follow(self.weights[0].parameter)
        self._current_thresholds.step(self.model, found_inf)

    def attach(self, optimizer: Any) -> RemovableHandle:
        """Call ``step()`` by itself after every step of the optimizer; the handle's ``remove()`` undoes it.

        Steps that a GradScaler skips because of infinite gradients do not count. A wrapper that holds the optimizer as
        ``.optimizer`` or ``.base_optimizer`` (accelerate, Lightning, SAM) is looked into. Where several optimizers
        share the model, attach to the one that steps last.

        Raises:
            TypeError, ValueError: no optimizer, or one that holds no prunable weight.
            RuntimeError: attached already.
        """
        self._check_live("attach")
        handle = self._optimizer_hook.add(optimizer, self.weights, self._advance)
        self._current_thresholds.step_watch.optimizer_hook = self._optimizer_hook
        return handle

    @property
    def step_count(self) -> int:
        """Number of steps so far; with capturable, read from the device, where replayed graphs count it."""
        return self._position.step

    @property
    def sparsity(self) -> float:
        """Sparsity that the schedule asks for at the current step."""
        return self._position.sparsity

    @property
    def threshold(self) -> Tensor:
        """T of the first weight (of all, in the global scope): 0-dim, on its device, updated in place by ``step()``."""
        self._check_live("threshold")
        return self.weights[0].uses[0].binding.value

    def refresh(self, model: nn.Module | None = None) -> None:
        """Select the thresholds anew from the weights as they are, at this sparsity.

        Needed only where the model's hook cannot see the change or does not run: writes to ``weight.data`` without a
        change between ``train()`` and ``eval()``; a model or an average whose forward is compiled, or that is called by
        its parts; weights in shared memory, and those of a model that is about to be exported. Any other change is
        noticed by the next forward of the model or of its copy.

        Args:
            model: a deep copy of the sparsified model (EMA, SWA), or a module around one; default the model itself.

        Raises:
            TypeError, ValueError: ``model`` is no module, or no copy of the sparsified model.
        """
        self._check_live("refresh")
        model = self.model if model is None else model
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a copy of the sparsified model, got {type(model).__name__}")
        hooks = [hook for hook in hooks_of(model) if hook.position.key == self._position.key]
        if len(hooks) != 1:
            raise ValueError(
                f"model must be, or hold, one deep copy of the whole sparsified model, got {type(model).__name__} with "
                f"{len(hooks) or 'none'}"
            )
        hooks[0].position = self._position
        hooks[0].select()

    # ------------------------------------------------------------------------------------------------ the end

    def finalize(self) -> nn.Module:
        """Write P(w) into every prunable weight and give the layers their dense classes back; returns the model.

        In the global scope the zeros among the prunable weights are then ``floor((N - 1) s) + 1`` plus ties, for the
        sparsity s > 0 of the current step (16-bit weights whose P(w) underflows come on top).

        Warns:
            SparsityWarning: the schedule has not ended, zeros are missing, a layer has no weight left (``min_density``
                prevents that), or layers came into the model later. Nothing is changed if the warning is an error.

        Raises:
            RuntimeError: as ``step()``; or a layer has been parametrized since.
        """
        self._check_live("finalize")
        layer_swap.check_not_parametrized(self.weights)
        self._current_thresholds.places.check(self.model)
        self._current_thresholds.select()  # the weights may have moved since the last step
        report = self.report()
        warn_unless_reached(report, self.schedule, self._total_steps)
        self._final_report = report
        layer_swap.write_zeros(self.weights)
        self._end("finalize")
        return self.model

    def detach(self) -> nn.Module:
        """Give the layers their dense classes back and leave the weights as they are, dense; returns the model.

        The report stays available, unless the model has changed since.
        """
        self._check_live("detach")
        layer_swap.check_not_parametrized(self.weights)
        with contextlib.suppress(RuntimeError, ValueError):  # a model that has changed has none, but gets its layers
            self._final_report = self.report()
        self._end("detach")
        return self.model

    # ------------------------------------------------------------------------------------------------ looking

    def report(self) -> Report:
        """Counts per layer and in total, skipped layers, at this moment; after the end, at its moment."""
        if self._final_report is not None:
            return self._final_report
        self._check_live("report")
        self._current_thresholds.check_model(self.model)
        self._current_thresholds.refresh_if_stale()
        measured = measure_layers(self.weights, self._policy, self.sparsity)
        skipped = *self.skipped, *self._current_thresholds.places.added(self.model, self._choice)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        budget = self._policy.budget(self.sparsity)
        return Report(self.step_count, self.sparsity, tuple(measured), skipped, parameters, budget)

    def state_dict(self) -> dict[str, Any]:
        """Step, thresholds, scales, schedule, layers: plain values and tensors, which load with weights_only=True."""
        self._check_live("state_dict")
        self._current_thresholds.check_model(self.model)
        self._current_thresholds.refresh_if_stale()
        bindings = [use.binding for use in layer_swap.uses_of(self.weights)]
        return {
            "step": self.step_count,
            "thresholds": torch.stack([binding.value for binding in bindings]),
            "grad_scales": self._thresholds.replica(*bindings[0].key).grad_scales.clone(),
            "schedule": repr(self.schedule),
            "layers": self._layer_names(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict()`` was taken; bit for bit if the model's weights are loaded too.

        Raises:
            ValueError: the state lacks a key or belongs to other layers. Nothing is changed then.
        """
        self._check_live("load_state_dict")
        check_state(state, self._layer_names(), len(layer_swap.uses_of(self.weights)))
        warn_of_schedule(state, self.schedule)
        self._position.move_to(int(state["step"]))
        if state["step"] > 0:
            self._current_thresholds.stop_watching()  # the run that is resumed has passed its check
        self._thresholds.assign(state["thresholds"], state["grad_scales"] if self._scales_change else None)
        self._current_thresholds.restored = True  # whatever order the model's weights are loaded in

    # ------------------------------------------------------------------------------------------------ inside

    def _layer_names(self) -> list[str]:
        return [f"{weight.name} {list(weight.parameter.shape)}" for weight in self.weights]

    def _check_live(self, what: str) -> None:
        if self._ended is not None:
            raise RuntimeError(f"{what} is not available after {self._ended}(): the model is dense again")

    def _end(self, how: str) -> None:
        layer_swap.make_dense(self.weights)
        self._optimizer_hook.remove()
        for hook in self._hooks:
            hook.remove()
        self._current_thresholds.stop_watching()
        self._current_thresholds.forget_position()
        self._ended = how

    def __repr__(self) -> str:
        state = "" if self._ended is None else f", ended by {self._ended}()"
        final = final_sparsity(self.schedule)
        goal = "" if final is None else f" of {final:.4g}"
        return (
            f"Sparsifier({type(self.model).__name__}: {len(self.weights)} weights with "
            f"{sum(self._policy.numels):,} elements, {len(self.skipped)} layers left dense; {self.schedule!r}, "
            f"step {self.step_count}, sparsity {self.sparsity:.4g}{goal}{state})"
        )

    def __getstate__(self) -> dict[str, Any]:
        """For copies: they do not follow the optimizers that this one is attached to, nor watch the first step."""
        schedule = self._position.schedule, self._position.scale_at, self._position.device_schedule
        choice = LayerChoice()  # the user's may hold a function, which may not pickle
        return {**self.__dict__, "_choice": choice, "_schedule": schedule}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give the position, pickled at a fixed sparsity with the models that share it, its schedule again."""
        schedule = state.pop("_schedule")
        self.__dict__.update(state)
        self._position.schedule, self._position.scale_at, self._position.device_schedule = schedule
        self._current_thresholds.policy = self._policy

    def __deepcopy__(self, memo: dict[int, Any]) -> Sparsifier:
        """The copy has a position of its own, and so have all copies of its model that are made with it."""
        old, new = self._position, self._position.independent()
        memo[id(old)] = new
        for copied in list(memo.values()):
            if isinstance(copied, CurrentThresholds) and copied.position is old:
                copied.position = new
        twin = memo[id(self)] = Sparsifier.__new__(Sparsifier)
        state = {name: value for name, value in self.__getstate__().items() if name != "_schedule"}
        twin.__dict__.update(copy.deepcopy(state, memo))
        return twin
