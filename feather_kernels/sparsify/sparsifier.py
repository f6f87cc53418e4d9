"""The sparsifier: makes a model's layers sparse and moves their thresholds along a schedule."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from feather_kernels.nn.base import SparseLayer
from feather_kernels.nn.conversion import finalize_weight, make_dense, make_sparse
from feather_kernels.nn.thresholds import Thresholds, WeightThreshold
from feather_kernels.ops.schema import check_power, compute_dtype
from feather_kernels.sparsify.device_schedule import DeviceSchedule
from feather_kernels.sparsify.first_step import FirstStep
from feather_kernels.sparsify.options import GradScale, check_dtypes, check_optimizer, check_options, resolve_grad_scale
from feather_kernels.sparsify.overrides import Override, resolve_overrides
from feather_kernels.sparsify.policies import Policy, ScopeFunction
from feather_kernels.sparsify.report import Report, measure_layers
from feather_kernels.sparsify.schedules import Schedule, final_sparsity, last_step, make_schedule, sparsity_at
from feather_kernels.sparsify.selection import Choice, FilterFn, Target, Use, layers_of_copy, select_weights
from feather_kernels.sparsify.state import check_state


class Sparsifier:
    """Sparse training with Feather (BMVC 2023, section 3).

    The constructor swaps the classes of the model's layers for sparse ones and sets the threshold of step 0; ``step()``
    after every ``optimizer.step()`` sets the next one. The model keeps its modules, Parameters and state_dict keys.
    ``finalize()`` writes the zeros into the weights and gives the plain layers back.

    Args:
        model: the module to train; it may itself be a layer.
        sparsity: final fraction of zeros among the prunable weights, in [0, 1).
        total_steps: number of optimizer steps of the training; gives ``CubicSchedule(sparsity, 0, total_steps // 2)``.
        schedule: a schedule of your own instead of ``sparsity``; with ``total_steps`` too, it is checked to arrive.
        scope: "global" (one threshold for all), "layer", "erk", or ``f(weights, sparsity) -> thresholds``; see
            ``policies.Policy``, also for ``min_density`` and ``score_scale``.
        power: p of the thresholding operator, at least 1 or inf.
        grad_scale: factor of the gradient on pruned weights, at least 0; "auto" is 1 for a final sparsity of at most
            0.95 and 0.5 above it; or a function of the current sparsity.
        targets, ignore, filter_fn, min_numel, read_directly, may_be_unused: which layers; see ``selection.Choice``.
        min_density: what every weight keeps at least, as a fraction of its elements.
        overrides: options of single layers, by name, ``re:`` pattern or class (names win): a dict with any of
            ``sparsity``, ``min_density``, ``power``, ``grad_scale``.
        score_scale: "none", "l2" or "fan".
        update_every: steps between two selections of the thresholds.
        save: "recompute" keeps nothing of P(w) for backward, "keep" saves computing it again where it can be.
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
        may_be_unused: Sequence[Target] | None = None,
        min_density: float = 0.0,
        overrides: Mapping[Target, Mapping[str, Any]] | None = None,
        score_scale: str = "none",
        update_every: int = 1,
        save: str = "recompute",
        capturable: bool = False,
    ) -> None:
        self.schedule = make_schedule(sparsity, total_steps, schedule)
        check_power(power)
        self._grad_scale, self._scales_change = resolve_grad_scale(grad_scale, self.schedule)
        check_options(update_every, save, capturable, scope)
        choice = Choice(targets, ignore, filter_fn, min_numel, read_directly, may_be_unused)
        self.model = model
        self.weights, self.skipped = select_weights(model, choice)
        if sum(weight.parameter.numel() for weight in self.weights) == 0:
            reasons = "".join(f"; {layer.name}: {layer.reason}" for layer in self.skipped)
            raise ValueError(f"model must have a prunable layer, got none{reasons}")
        check_dtypes(self.weights)
        settings = resolve_overrides(self.weights, overrides)
        final = final_sparsity(self.schedule)
        self._policy = Policy(self.weights, scope, min_density, score_scale, settings, final)
        self._update_every = update_every
        self._step = 0
        self._ended: str | None = None
        self._final_report: Report | None = None
        self._handles: list[RemovableHandle] = []
        self._device_schedule = self._make_device_schedule(total_steps) if capturable else None
        initial = self._select([weight.parameter for weight in self.weights])
        self._thresholds = self._make_sparse(settings, power, save == "keep")
        self._thresholds.assign(self._per_use(initial), self._scales_now(initial))
        self._first_step: FirstStep | None = FirstStep()

    # ------------------------------------------------------------------------------------------------ training

    def step(self) -> None:
        """Advance the schedule by one optimizer step and set the thresholds for the next forward pass.

        Call it after ``optimizer.step()``. Reads nothing on the host. Past the end of the schedule the final sparsity
        is kept.

        Raises:
            RuntimeError: after ``finalize()`` or ``detach()``; or, in the first call, if a sparse layer's forward has
                not run: some module reads its weight directly, which would train it dense.
        """
        self._check_live("step")
        if self._first_step is not None:
            self._first_step.check(self._uses())
            self._first_step = None
        self._step += 1
        if self._device_schedule is not None:
            self._device_schedule.advance()
        if self._step % self._update_every == 0:
            self._update(self.model)

    def attach(self, optimizer: Optimizer) -> RemovableHandle:
        """Call ``step()`` by itself after every step of the optimizer; the handle's ``remove()`` undoes it.

        Steps that a GradScaler skips because of infinite gradients do not count. Where several optimizers share the
        model, attach to the one that steps last.

        Raises:
            TypeError, ValueError: no optimizer, or one that holds no prunable weight.
            RuntimeError: attached already.
        """
        self._check_live("attach")
        check_optimizer(optimizer, self.weights)
        if any(handle.id in (handle.hooks_dict_ref() or ()) for handle in self._handles):
            raise RuntimeError("the sparsifier is attached already: remove() the handle of the first attach()")

        def after_step(optimizer: Optimizer, *_: Any) -> None:
            found_inf = getattr(optimizer, "found_inf", None)  # GradScaler sets it where the optimizer itself skips
            if found_inf is None or not found_inf.item():
                self.step()

        self._handles.append(optimizer.register_step_post_hook(after_step))
        return self._handles[-1]

    @property
    def step_count(self) -> int:
        """Number of steps so far; with capturable, read from the device, where replayed graphs count it."""
        return self._step if self._device_schedule is None else int(self._device_schedule.step)

    @property
    def sparsity(self) -> float:
        """Sparsity that the schedule asks for at the current step."""
        return sparsity_at(self.schedule, self.step_count)

    @property
    def threshold(self) -> Tensor:
        """T of the first weight (of all, in the global scope): 0-dim, on its device, updated in place by ``step()``."""
        self._check_live("threshold")
        return self.weights[0].uses[0].threshold.threshold

    def rethreshold(self, model: nn.Module) -> None:
        """Set the thresholds of ``model``, a copy of the sparsified model, from its own weights at this sparsity.

        A deep copy (EMA, SWA) has thresholds of its own, frozen when the copy was made; averaged weights need some
        selected from them to have the sparsity asked for. With the sparsifier's own model it selects anew, e.g. after
        weights were loaded.

        Raises:
            ValueError: the sparse layers of ``model`` are not those of the sparsifier's model.
        """
        self._check_live("rethreshold")
        self._update(model)

    # ------------------------------------------------------------------------------------------------ the end

    def finalize(self) -> nn.Module:
        """Write P(w) into every prunable weight and give the layers their dense classes back; returns the model.

        In the global scope the zeros among the prunable weights are then ``floor((N - 1) s) + 1`` plus ties, for the
        sparsity s > 0 of the current step (16-bit weights whose P(w) underflows come on top).
        """
        self._check_live("finalize")
        self._update(self.model)  # the weights may have moved since the last step
        self._final_report = self.report()
        for weight in self.weights:
            use = weight.uses[0]  # once, also where it is tied
            finalize_weight(cast(SparseLayer, use.module), use.parameter_name)
        self._end("finalize")
        return self.model

    squash_mask = finalize

    def detach(self) -> nn.Module:
        """Give the layers their dense classes back and leave the weights as they are, dense; returns the model."""
        self._check_live("detach")
        self._final_report = self.report()
        self._end("detach")
        return self.model

    # ------------------------------------------------------------------------------------------------ looking

    def report(self) -> Report:
        """Counts per layer and in total, skipped layers, at this moment; after the end, at its moment."""
        if self._final_report is not None:
            return self._final_report
        uses = [weight.uses[0] for weight in self.weights]
        recomputes = [cast(SparseLayer, use.module).recomputes and not use.threshold.keep for use in uses]
        thresholds = [use.threshold.threshold for use in uses]
        layers = measure_layers(self.weights, thresholds, recomputes, self._policy, self.sparsity)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return Report(self.step_count, self.sparsity, tuple(layers), tuple(self.skipped), parameters)

    def state_dict(self) -> dict[str, Any]:
        """Step, thresholds, scales, schedule, layers: plain values and tensors, which load with weights_only=True."""
        self._check_live("state_dict")
        return {
            "step": self.step_count,
            "thresholds": torch.stack([use.threshold.threshold for use in self._uses()]),
            "grad_scales": self._thresholds.replica(*self._uses()[0].threshold.key).grad_scales.clone(),
            "schedule": repr(self.schedule),
            "layers": self._layer_names(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict()`` was taken; bit for bit if the model's weights are loaded too.

        Raises:
            ValueError: the state lacks a key or belongs to other layers. Nothing is changed then.
        """
        self._check_live("load_state_dict")
        check_state(state, self._layer_names(), len(self._uses()))
        if state["schedule"] != repr(self.schedule):
            warnings.warn(f"the state was saved under {state['schedule']}; now {self.schedule!r}", stacklevel=2)
        self._step = int(state["step"])
        if self._device_schedule is not None:
            self._device_schedule.step.fill_(self._step)
        if self._step > 0:
            self._first_step = None  # the run that is resumed has passed its check
        self._thresholds.assign(state["thresholds"], state["grad_scales"] if self._scales_change else None)

    # ------------------------------------------------------------------------------------------------ inside

    def _make_sparse(self, settings: Sequence[Override], power: float, keep: bool) -> Thresholds:
        """Swap the classes; the thresholds of all uses are elements of the result, in their order."""
        scale = self._grad_scale(sparsity_at(self.schedule, 0))
        per_use = [setting for setting, weight in zip(settings, self.weights, strict=True) for _ in weight.uses]
        thresholds = Thresholds(
            [power if setting.power is None else setting.power for setting in per_use],
            [scale if setting.grad_scale is None else setting.grad_scale for setting in per_use],
            self._scales_change,
            keep,
        )
        by_module: dict[nn.Module, dict[str, WeightThreshold]] = {}
        for index, use in enumerate(self._uses()):
            threshold = WeightThreshold(thresholds, index, use.latent)
            by_module.setdefault(use.module, {})[use.parameter_name] = threshold
        for use in self._uses():
            if use.module in by_module:
                make_sparse(use.module, by_module.pop(use.module), use.form)
        return thresholds

    def _make_device_schedule(self, total_steps: int | None) -> DeviceSchedule:
        parameter = self.weights[0].parameter
        end = last_step(self.schedule, total_steps)
        dtype = compute_dtype(parameter.dtype)
        return DeviceSchedule(self._policy, self.schedule, end, self._grad_scale, parameter.device, dtype)

    def _select(self, parameters: list[Tensor]) -> Tensor:
        """(L,) thresholds of the weights at the current step; 0 for weights without data (meta device)."""
        first = parameters[0]
        devices = {parameter.device for parameter in parameters}
        if len(devices) > 1:
            raise ValueError(f"the prunable weights must be on one device, got {sorted(map(str, devices))}")
        dtype = compute_dtype(first.dtype)
        with torch.no_grad():
            if first.device.type == "meta":
                return first.new_zeros(len(parameters), dtype=dtype)
            if self._device_schedule is not None:
                self._device_schedule.follow(first)
                ranks, fractions, _ = self._device_schedule.now()
                return self._policy.thresholds(parameters, ranks, fractions)
            return self._policy.thresholds_at(parameters, self.sparsity)

    def _update(self, model: nn.Module) -> None:
        """Select the thresholds from the weights of ``model`` and write them to that model's layers."""
        if model is self.model:
            parameters = [weight.parameter for weight in self.weights]
            uses = self._uses()
            for use in uses:
                use.threshold.follow(use.latent)
            self._thresholds.keep_only({use.threshold.key for use in uses})
            selected = self._select(parameters)
            self._thresholds.assign(self._per_use(selected), self._scales_now(selected))
            return
        layers = layers_of_copy(self._uses(), self.model, model)
        copies = [layers[weight.uses[0].module].latent(weight.uses[0].parameter_name) for weight in self.weights]
        values = self._per_use(self._select(copies))
        scales = self._scales_now(values)
        for i, use in enumerate(self._uses()):
            written = layers[use.module].feather.thresholds[use.parameter_name]
            written.write(values[i], None if scales is None else scales[i])

    def _per_use(self, values: Tensor) -> Tensor:
        """(L,) thresholds, one per distinct weight -> one per use of a weight."""
        counts = [len(weight.uses) for weight in self.weights]
        if max(counts) == 1:
            return values
        return torch.cat([value.expand(count) for value, count in zip(values.split(1), counts, strict=True)])

    def _scales_now(self, like: Tensor) -> Tensor | None:
        """(uses,) gradient scales to write, in dtype and on the device of ``like``; None where they do not change."""
        if not self._scales_change or like.device.type == "meta":
            return None
        scale = self._device_schedule.now()[2] if self._device_schedule else self._grad_scale(self.sparsity)
        return self._per_use(self._policy.with_own_grad_scales(scale, like))

    def _uses(self) -> list[Use]:
        return [use for weight in self.weights for use in weight.uses]

    def _layer_names(self) -> list[str]:
        return [f"{weight.name} {list(weight.parameter.shape)}" for weight in self.weights]

    def _check_live(self, what: str) -> None:
        if self._ended is not None:
            raise RuntimeError(f"{what} is not available after {self._ended}(): the model is dense again")

    def _end(self, how: str) -> None:
        for module in dict.fromkeys(use.module for use in self._uses()):
            make_dense(cast(SparseLayer, module))
        for handle in self._handles:
            handle.remove()
        self._first_step = None
        self._ended = how

    def __getstate__(self) -> dict[str, Any]:
        """For copies: they do not follow the optimizers that this one is attached to, nor watch the first step."""
        return {**self.__dict__, "_handles": [], "_first_step": None}
