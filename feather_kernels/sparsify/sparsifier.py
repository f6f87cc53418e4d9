"""The sparsifier, which makes a model's layers sparse and moves their thresholds along a schedule."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from feather_kernels.checks import check_power
from feather_kernels.sparsify import layer_swap
from feather_kernels.sparsify.current_thresholds import CurrentThresholds, hooks_of
from feather_kernels.sparsify.device_schedule import DeviceSchedule
from feather_kernels.sparsify.layer_choice import FilterFn, LayerChoice, choose_weights
from feather_kernels.sparsify.optimizer_hook import OptimizerHook
from feather_kernels.sparsify.options import (
    GradScale,
    check_any_prunable,
    check_dtypes,
    check_model,
    check_options,
    resolve_grad_scale,
)
from feather_kernels.sparsify.overrides import resolve_overrides
from feather_kernels.sparsify.policies import Policy, ScopeFunction
from feather_kernels.sparsify.report import Report, measure_layers, measure_own_parts, of_dense_layers
from feather_kernels.sparsify.schedule_position import SchedulePosition
from feather_kernels.sparsify.schedules import Schedule, final_sparsity, last_step, make_schedule, sparsity_at
from feather_kernels.sparsify.sparsity_warnings import warn_of_frozen, warn_of_thawed, warn_unless_reached
from feather_kernels.sparsify.state_checks import check_state, warn_of_schedule
from feather_kernels.sparsify.unused_layers import UnusedLayerWatch
from feather_kernels.torch_private import outside_compilers

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

    from feather_kernels.sparsify.layer_names import Target


class Sparsifier:
    """Trains a model with Feather (BMVC 2023, section 3), so that a fraction of its weights is zero in the end.

    The constructor swaps the classes of the model's layers for sparse ones and sets the thresholds of step 0. Call
    ``step()`` after every ``optimizer.step()`` to set the next ones, and ``finalize()`` at the end, to write the zeros
    into the weights and get the dense layers back. The model keeps its modules, Parameters and state_dict keys.

    An entry of ``targets``, ``ignore``, ``read_directly`` or ``overrides`` is the name of a layer or of a module that
    contains it, a regular expression ``"re:..."`` for the whole name, or a module class.

    Args:
        model: the module to train; it may be a single layer.
        sparsity: final fraction of zeros among the prunable weights, in [0, 1).
        total_steps: number of optimizer steps of the training. With ``sparsity`` it makes the schedule
            ``CubicSchedule(sparsity, 0, total_steps // 2)``; with ``schedule`` the constructor warns if that does not
            reach its final sparsity in time.
        schedule: a schedule to use instead of ``sparsity``, see ``Schedule``.
        scope: which weights share a threshold. "global": all; "layer": every layer reaches the schedule's sparsity;
            "erk": layers get densities by Erdos-Renyi-kernel (Evci et al. 2020), which average to the schedule's; or a
            function ``f(weights, sparsity)`` that returns a tensor of one threshold per weight, or a single one.
        power: p of the thresholding operator ``sign(w) (abs(w)^p - T^p)^(1/p)``, at least 1; ``math.inf`` is hard
            thresholding.
        grad_scale: factor of the gradient of pruned weights, at least 0, or a function of the current sparsity.
            "auto" is 1 for a final sparsity of at most 0.95, and 0.5 above it.
        targets: the layers to prune; None means all linear, convolution, attention and recurrent layers. Frozen
            weights, adapters, standardised convolutions and layers of other kinds are pruned only if they are named.
        ignore: layers that stay dense even if ``targets`` matches them.
        filter_fn: ``filter_fn(module, name)``; layers for which it returns False stay dense.
        min_numel: layers whose weight has fewer elements stay dense.
        read_directly: layers whose weight some module reads without calling the layer; their attribute ``weight``
            returns the sparse weight.
        min_density: fraction of its elements that every weight keeps at least, in [0, 1]; other weights are pruned
            more to compensate.
        overrides: options of single layers: ``{"head": {"sparsity": 0.5}}``. Options are ``sparsity``,
            ``min_density``, ``power`` and ``grad_scale``. Names precede patterns, and these precede classes.
        score_scale: what is compared with the threshold. "none": ``abs(w)``; "l2": ``abs(w) / norm(w)`` with the
            norm of the layer's weight; "fan": ``abs(w) / sqrt(sum(shape))``.
        recompute: whether backward recomputes P(w) (True; linear layers and convolutions only), or forward keeps it
            (False). None keeps it if all P(w) together take at most 1 GiB, and always if P(w) is narrower than w:
            under autocast a dense layer keeps a cast copy too.
        capturable: whether step, ranks and thresholds are kept on the device, so that a CUDA graph can capture
            ``step()``.

    Attributes:
        model: the model.
        weights: the prunable weights; a tied weight has one entry.
        skipped: the layers that stay dense, with reasons.
        schedule: the schedule.

    Warns:
        SparsityWarning: ``schedule`` does not reach its final sparsity in ``total_steps``.

    Raises:
        ValueError: an argument is out of range or contradicts another, an entry matches no layer, or there is no layer
            to prune.
        TypeError: an argument has the wrong type.

    Example:
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> sparsifier = fk.Sparsifier(model, sparsity=0.9, total_steps=20)
        >>> for _ in range(20):
        ...     loss = model(torch.randn(8, 64)).square().mean()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        ...     sparsifier.step()
        >>> model = sparsifier.finalize()
        >>> type(model[0]).__name__, f"{sparsifier.report().sparsity:.1%}"
        ('Linear', '90.0%')
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
        check_any_prunable(self.weights, self.skipped, model)
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

        Call it after ``optimizer.step()``, and on all ranks if weights are sharded (FSDP2). It does not wait for the
        device. After the end of the schedule the final sparsity stays.

        Raises:
            RuntimeError: ``finalize()``, ``detach()`` or ``attach()`` was called before; a sparse layer is no longer
                part of the model; a weight has another shape, or is sharded by anything but FSDP2; a weight got a
                gradient though no training forward has called its layer, because some module reads it directly and
                trains it dense; or weights are sharded and the ranks do not step alike.
        """
        self._check_live("step")
        if self._optimizer_hook.active:
            raise RuntimeError(
                "step() is called by the optimizer that the sparsifier is attached to, and a second call would count "
                "the step twice: do not call it, or remove() the handle that attach() returned"
            )
        self._advance()

    @outside_compilers
    def _advance(self, found_inf: Tensor | None = None) -> None:
        """Advance by one optimizer step, unless ``found_inf`` says that the optimizer has skipped it."""
        self._left_frozen = warn_of_thawed(self._left_frozen)
        if self._current_thresholds.watch is not None:
            trainable, self._trainable_at_start = self._trainable_at_start, []
            warn_of_frozen(trainable)
        if self._position.device_schedule is not None:
            self._position.device_schedule.follow(self.weights[0].parameter)
        self._current_thresholds.step(self.model, found_inf)

    def attach(self, optimizer: Any) -> RemovableHandle:
        """Step automatically after every step of an optimizer.

        Steps that a GradScaler skips because of infinite gradients do not count.

        Args:
            optimizer: the optimizer, or a wrapper that holds it as ``.optimizer`` or ``.base_optimizer`` (accelerate,
                Lightning, SAM). If several optimizers share the model, give the one that steps last.

        Returns:
            A handle; its ``remove()`` detaches the optimizer.

        Raises:
            TypeError: ``optimizer`` is no optimizer.
            ValueError: it holds no prunable weight.
            RuntimeError: an optimizer is attached already, or ``finalize()`` or ``detach()`` was called before.
        """
        self._check_live("attach")
        handle = self._optimizer_hook.add(optimizer, self.weights, self._advance)
        self._current_thresholds.step_watch.optimizer_hook = self._optimizer_hook
        return handle

    @property
    def step_count(self) -> int:
        """Number of steps so far; with ``capturable`` it is read from the device, where replayed graphs count."""
        return self._position.step

    @property
    def sparsity(self) -> float:
        """Sparsity of the schedule at the current step."""
        return self._position.sparsity

    @property
    def threshold(self) -> Tensor:
        """Threshold of the first weight (global scope: of all weights), 0-dim, updated in place by ``step()``."""
        self._check_live("threshold")
        return self.weights[0].uses[0].binding.value

    def refresh(self, model: nn.Module | None = None) -> None:
        """Select the thresholds again from the current weights, at the current sparsity.

        The next forward of the model or its copy does this when it notices that weights have changed. Call it yourself

        - after writes to ``weight.data`` that no change between ``train()`` and ``eval()`` follows,
        - for a model or an average whose forward is compiled, or whose parts are called instead,
        - for weights in shared memory, and before an export.

        Args:
            model: a deep copy of the sparse model (EMA, SWA), or a module that contains one; None means the model
                itself.

        Raises:
            TypeError, ValueError: ``model`` is no module, or no copy of the sparse model.
            RuntimeError: ``finalize()`` or ``detach()`` was called before.
        """
        self._check_live("refresh")
        model = self.model if model is None else model
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a deep copy of the sparse model, got {type(model).__name__}")
        hooks = [hook for hook in hooks_of(model) if hook.position.key == self._position.key]
        if len(hooks) != 1:
            raise ValueError(
                f"model must be or contain one deep copy of the whole sparse model, got {type(model).__name__} with "
                f"{len(hooks) or 'none'}"
            )
        hooks[0].position = self._position
        hooks[0].select()

    # ------------------------------------------------------------------------------------------------ the end

    def finalize(self) -> nn.Module:
        """Write P(w) into every prunable weight and give the layers their dense classes back.

        In the global scope ``floor((N - 1) s) + 1`` of N prunable weights are then zero, plus ties, if the sparsity s
        of the current step is above 0. Weights of 16 bits may have more zeros, where P(w) underflows.

        Returns:
            The model.

        Warns:
            SparsityWarning: the schedule has not ended, zeros are missing, a layer has no weight left (``min_density``
                prevents that), or a layer was added to the model later. If warnings are errors, nothing is changed.

        Raises:
            RuntimeError: as ``step()``, or a layer was parametrized after the model was made sparse.
        """
        self._check_live("finalize")
        layer_swap.check_not_parametrized(self.weights)
        self._current_thresholds.places.check(self.model)
        self._current_thresholds.select()  # the weights may have moved since the last step
        report = self.report()
        warn_unless_reached(report, self.schedule, self._total_steps)
        self._final_report = of_dense_layers(report)
        layer_swap.write_zeros(self.weights)
        self._end("finalize")
        return self.model

    def detach(self) -> nn.Module:
        """Give the layers their dense classes back without pruning the weights.

        ``report()`` stays available, unless the model was changed.

        Returns:
            The model.

        Raises:
            RuntimeError: ``finalize()`` or ``detach()`` was called before, or a layer was parametrized after the model
                was made sparse.
        """
        self._check_live("detach")
        layer_swap.check_not_parametrized(self.weights)
        with contextlib.suppress(RuntimeError, ValueError):  # a changed model has no report, but gets its dense layers
            self._final_report = None if self._current_thresholds.shards.exist() else of_dense_layers(self.report())
        self._end("detach")
        return self.model

    # ------------------------------------------------------------------------------------------------ report and state

    def report(self, local: bool = False) -> Report:
        """Count the zeros now; after ``finalize()`` or ``detach()``, return the counts of that moment.

        If weights are sharded (FSDP2), it counts them under the thresholds of the last step; call it on all ranks.

        Args:
            local: count only what this process has of sharded weights, without ties, and wait for no other process.

        Returns:
            Counts per layer and in total, and the layers that stay dense.

        Raises:
            RuntimeError: as ``step()``.
        """
        if self._final_report is not None:
            return self._final_report
        self._check_live("report")
        if local and self._current_thresholds.shards.exist():
            self._current_thresholds.check_model(self.model)
            measured = measure_own_parts(self.weights, self._current_thresholds.shards.parameters())
        else:
            parameters, statistics = self._current_thresholds.looked_at(self.model)
            measured = measure_layers(self.weights, parameters, self._policy, self.sparsity, statistics)
        skipped = *self.skipped, *self._current_thresholds.places.added(self.model, self._choice)
        count = sum(parameter.numel() for parameter in self.model.parameters())
        budget = self._policy.budget(self.sparsity)
        return Report(self.step_count, self.sparsity, tuple(measured), skipped, count, budget)

    def assert_consistent(self) -> None:
        """Compare step, thresholds, zeros and the weights' bits of all ranks; to be called on all of them.

        It reads everything, so it is for the start of a run, for checkpoints and for tests.

        Raises:
            RuntimeError: on all ranks, naming those that differ and their layers.
        """
        self._check_live("assert_consistent")
        if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
            return
        from feather_kernels.sparsify.distributed.consistency import compare, fingerprint

        parameters, statistics = self._current_thresholds.looked_at(self.model)
        measured = measure_layers(self.weights, parameters, self._policy, self.sparsity, statistics)
        compare(fingerprint(self.step_count, measured, parameters, self._current_thresholds.shards.parts))

    def state_dict(self) -> dict[str, Any]:
        """The state from which a training resumes, for ``torch.save`` along with the model's and the optimizer's.

        Returns:
            A dict of plain values and tensors, which ``torch.load`` reads with ``weights_only=True``.

        Raises:
            RuntimeError: as ``step()``.
        """
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
        """Continue from a saved state, bit for bit if the model's weights are loaded too.

        Args:
            state: what ``state_dict()`` returned.

        Warns:
            SparsityWarning: the state was saved under another schedule.

        Raises:
            ValueError, TypeError: the state is not that of a sparsifier with these layers; nothing is changed then.
            RuntimeError: ``finalize()`` or ``detach()`` was called before.
        """
        self._check_live("load_state_dict")
        check_state(state, self._layer_names(), len(layer_swap.uses_of(self.weights)))
        warn_of_schedule(state, self.schedule)
        self._position.move_to(int(state["step"]))
        if state["step"] > 0:
            self._current_thresholds.stop_watching()  # the run that is resumed has passed its check
        self._thresholds.assign(state["thresholds"], state["grad_scales"] if self._scales_change else None)
        self._current_thresholds.restored = True  # whatever order the model's weights are loaded in

    # ------------------------------------------------------------------------------------------------ internals

    def _layer_names(self) -> list[str]:
        return [f"{weight.name} {list(weight.parameter.shape)}" for weight in self.weights]

    def _check_live(self, what: str) -> None:
        if self._ended is not None:
            raise RuntimeError(f"{what} is not available after {self._ended}(), which made the model dense again")

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
        """Leave out what copies do not share: attached optimizers and the watch over the first step."""
        schedule = self._position.schedule, self._position.scale_at, self._position.device_schedule
        choice = LayerChoice()  # the user's may hold a function, which may not pickle
        return {**self.__dict__, "_choice": choice, "_schedule": schedule}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore the schedule: the position was pickled at a fixed sparsity, for the models that share it."""
        schedule = state.pop("_schedule")
        self.__dict__.update(state)
        self._position.schedule, self._position.scale_at, self._position.device_schedule = schedule
        self._current_thresholds.policy = self._policy

    def __deepcopy__(self, memo: dict[int, Any]) -> Sparsifier:
        """Give the copy, and the copies of its model that are made with it, a position of their own."""
        old, new = self._position, self._position.independent()
        memo[id(old)] = new
        for copied in list(memo.values()):
            if isinstance(copied, CurrentThresholds) and copied.position is old:
                copied.position = new
        twin = memo[id(self)] = Sparsifier.__new__(Sparsifier)
        state = {name: value for name, value in self.__getstate__().items() if name != "_schedule"}
        twin.__dict__.update(copy.deepcopy(state, memo))
        return twin
