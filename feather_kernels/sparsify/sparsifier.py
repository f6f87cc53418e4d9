"""The sparsifier: makes a model's layers sparse and moves their common threshold along a schedule."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from feather_kernels.functional import check_grad_scale, interpolate, quantile_position
from feather_kernels.nn.layers import SparseLayer, finalize_weight, make_dense, make_sparse
from feather_kernels.nn.thresholds import LayerThreshold, Thresholds
from feather_kernels.ops.eager import CallRecord
from feather_kernels.ops.schema import check_power, compute_dtype
from feather_kernels.sparsify.report import LayerReport, Report
from feather_kernels.sparsify.schedules import CubicSchedule, Schedule
from feather_kernels.sparsify.selection import FilterFn, PrunableWeight, SkippedLayer, Target, select_layers

ops = torch.ops.feather_kernels


class Sparsifier:
    """Sparse training with Feather under a global magnitude threshold (BMVC 2023, section 3).

    The constructor swaps the classes of the model's Linear and Conv2d layers for sparse ones and sets the threshold of
    step 0; ``step()`` after every ``optimizer.step()`` sets the next one. The model keeps its modules, Parameters and
    state_dict keys. ``finalize()`` writes the zeros into the weights and gives the plain layers back.

    Args:
        model: the module to train; it may itself be a layer.
        sparsity: final fraction of zeros among the prunable weights, in [0, 1).
        total_steps: number of optimizer steps of the training; gives ``CubicSchedule(sparsity, 0, total_steps // 2)``.
        schedule: a schedule of your own instead of ``sparsity``; with ``total_steps`` too, it is checked to arrive.
        power: p of the thresholding operator, at least 1 or inf.
        grad_scale: factor of the gradient on pruned weights, at least 0; "auto" is 1 for a final sparsity of at most
            0.95 and 0.5 above it.
        targets, ignore, filter_fn, min_numel: which layers; see ``select_layers``.

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
        power: float = 3.0,
        grad_scale: float | str = "auto",
        targets: Sequence[Target] | None = None,
        ignore: Sequence[Target] | None = None,
        filter_fn: FilterFn | None = None,
        min_numel: int = 0,
    ) -> None:
        self.schedule = _make_schedule(sparsity, total_steps, schedule)
        check_power(power)
        scale = _resolve_grad_scale(grad_scale, self.schedule)
        self.model = model
        self.weights, self.skipped = select_layers(model, targets, ignore, filter_fn, min_numel)
        if sum(weight.numel() for weight in map(_parameter, self.weights)) == 0:
            raise ValueError(f"model must have a prunable layer, got none{_list_skipped(self.skipped)}")
        self._step = 0
        self._final_report: Report | None = None
        initial = _select([_parameter(weight) for weight in self.weights], self.sparsity)
        modules = self._layers()
        self._thresholds = Thresholds(len(modules), power, scale)
        for index, module in enumerate(modules):
            make_sparse(module, LayerThreshold(self._thresholds, index, module.weight))
        self._thresholds.assign(initial)
        self._record: CallRecord | None = CallRecord()
        self._record.start()

    # ------------------------------------------------------------------------------------------------ training

    def step(self) -> None:
        """Advance the schedule by one optimizer step and set the threshold for the next forward pass.

        Call it after ``optimizer.step()``. Reads nothing on the host. Past the end of the schedule the final sparsity
        is kept.

        Raises:
            RuntimeError: after ``finalize()``; or, in the first call, if a sparse layer's forward has not run: some
                module reads its weight directly, which would train it dense.
        """
        self._check_live("step")
        self._check_called()
        self._step += 1
        self._update(self.model)

    @property
    def sparsity(self) -> float:
        """Sparsity that the schedule asks for at the current step."""
        return self.schedule.sparsity_at(self._step)

    @property
    def step_count(self) -> int:
        """Number of ``step()`` calls so far."""
        return self._step

    @property
    def threshold(self) -> Tensor:
        """T of the current step: a 0-dim tensor on the weights' device that ``step()`` updates in place."""
        self._check_live("threshold")
        return _first_layer(self.weights[0]).feather.threshold

    def rethreshold(self, model: nn.Module) -> None:
        """Set the threshold of ``model``, a copy of the sparsified model, from its own weights at this sparsity.

        A deep copy (EMA, SWA) has a threshold of its own, frozen when the copy was made; averaged weights need one
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

        The zeros among the prunable weights are then ``floor((N - 1) s) + 1`` plus ties, for the sparsity s > 0 of
        the current step (16-bit weights whose P(w) underflows come on top).
        """
        self._check_live("finalize")
        self._final_report = self.report()
        for weight in self.weights:
            finalize_weight(_first_layer(weight))  # once, also where it is tied
        for layer in self._layers():
            make_dense(layer)
        self._stop_record()
        return self.model

    squash_mask = finalize

    # ------------------------------------------------------------------------------------------------ looking

    def report(self) -> Report:
        """Counts per layer and in total, skipped layers, at this moment; after ``finalize()``, at its moment."""
        if self._final_report is not None:
            return self._final_report
        with torch.no_grad():
            layers = _layer_reports(self.weights, self.sparsity)
        parameters = sum(parameter.numel() for parameter in self.model.parameters())
        return Report(self._step, self.sparsity, tuple(layers), tuple(self.skipped), parameters)

    def state_dict(self) -> dict[str, Any]:
        """Step, threshold, schedule and layers; ints, strings, lists and one tensor: loads with weights_only=True."""
        return {
            "step": self._step,
            "threshold": self.threshold.detach().clone(),
            "schedule": repr(self.schedule),
            "layers": self._layer_names(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict()`` was taken; bit for bit if the model's weights are loaded too.

        Raises:
            ValueError: the state lacks a key or belongs to other layers. Nothing is changed then.
        """
        self._check_live("load_state_dict")
        missing = {"step", "threshold", "schedule", "layers"} - set(state)
        if missing:
            raise ValueError(f"state must be that of a Sparsifier, but lacks {sorted(missing)}")
        if state["layers"] != self._layer_names():
            pairs = zip([*state["layers"], "nothing"], [*self._layer_names(), "nothing"], strict=False)
            theirs, ours = next((a, b) for a, b in pairs if a != b)
            raise ValueError(f"state must belong to this model's layers: expected {ours}, got {theirs}")
        if state["schedule"] != repr(self.schedule):
            warnings.warn(f"the state was saved under {state['schedule']}; now {self.schedule!r}", stacklevel=2)
        self._step = int(state["step"])
        if self._step > 0:
            self._stop_record()  # the run that is resumed has passed the check of its first step
        self._thresholds.assign(state["threshold"].reshape(1))

    # ------------------------------------------------------------------------------------------------ inside

    def _update(self, model: nn.Module) -> None:
        """Select T from the weights of ``model`` at the current sparsity and write it to that model's layers."""
        layers = self._layers() if model is self.model else self._layers_of_copy(model)
        parameters = list(dict.fromkeys(layer.weight for layer in layers))
        thresholds = layers[0].feather.thresholds
        thresholds.keep_only({layer.feather.key for layer in layers})
        thresholds.assign(_select(parameters, self.sparsity))

    def _named_layers(self) -> list[tuple[str, SparseLayer]]:
        return [
            (name, cast(SparseLayer, module))
            for weight in self.weights
            for name, module in zip(weight.names, weight.modules, strict=True)
        ]

    def _layers(self) -> list[SparseLayer]:
        return [layer for _, layer in self._named_layers()]

    def _layer_names(self) -> list[str]:
        return [f"{weight.name} {list(_parameter(weight).shape)}" for weight in self.weights]

    def _check_live(self, what: str) -> None:
        if self._final_report is not None:
            raise RuntimeError(f"{what} is not available after finalize(): the model is dense again")

    def _layers_of_copy(self, model: nn.Module) -> list[SparseLayer]:
        layers = [module for module in model.modules() if isinstance(module, SparseLayer)]
        ours = sorted(tuple(layer.weight.shape) for layer in self._layers())
        theirs = sorted(tuple(layer.weight.shape) for layer in layers)
        if ours != theirs:
            raise ValueError(f"model must be a copy of the sparsified model with sparse weights {ours}, got {theirs}")
        return layers

    def _check_called(self) -> None:
        if self._record is None:
            return
        unread = [
            name
            for name, layer in self._named_layers()
            if layer.weight.numel() and layer.feather.threshold.data_ptr() not in self._record.addresses
        ]
        if unread:
            raise RuntimeError(
                f"the forward of {len(unread)} sparse layers has not run in the first training step: "
                f"{', '.join(unread)}. Either the model did not use them or it reads their weight directly, which "
                "would train them dense; leave them out with ignore=[...]"
            )
        self._stop_record()

    def _stop_record(self) -> None:
        if self._record is not None:
            self._record.stop()
            self._record = None

    def __del__(self) -> None:
        if getattr(self, "_record", None) is not None:
            self._stop_record()


def _make_schedule(sparsity: float | None, total_steps: int | None, schedule: Schedule | None) -> Schedule:
    if total_steps is not None and total_steps <= 0:
        raise ValueError(f"total_steps must be positive, got {total_steps}")
    if schedule is None:
        if sparsity is None or total_steps is None:
            raise ValueError(f"give sparsity and total_steps, or schedule; got {sparsity=}, {total_steps=}")
        return CubicSchedule(sparsity, 0, total_steps // 2)
    if sparsity is not None:
        raise ValueError(f"give either sparsity or schedule, got both: {sparsity} and {schedule}")
    final = schedule.final_sparsity
    if total_steps is not None and final is not None and schedule.sparsity_at(total_steps) < final:
        reached = schedule.sparsity_at(total_steps)
        warnings.warn(f"{schedule} reaches {reached:.4f} of {final:.4f} in {total_steps} steps", stacklevel=3)
    return schedule


def _resolve_grad_scale(grad_scale: float | str, schedule: Schedule) -> float:
    if isinstance(grad_scale, str):
        if grad_scale != "auto":
            raise ValueError(f'grad_scale must be a number of at least 0 or "auto", got {grad_scale!r}')
        if schedule.final_sparsity is None:
            raise ValueError(f'grad_scale "auto" needs a schedule with a final_sparsity, got {schedule}')
        return 1.0 if schedule.final_sparsity <= 0.95 else 0.5
    check_grad_scale(grad_scale)
    return float(grad_scale)


def _select(parameters: list[Tensor], sparsity: float) -> Tensor:
    """(1,) global magnitude threshold; 0 at sparsity 0 and for weights without data (meta device)."""
    first = parameters[0]
    devices = {parameter.device for parameter in parameters}
    if len(devices) > 1:
        raise ValueError(f"the prunable weights must be on one device, got {sorted(map(str, devices))}")
    if sparsity == 0 or first.device.type == "meta":
        return first.new_zeros(1, dtype=compute_dtype(first.dtype)).detach()
    rank, fraction = quantile_position(sum(parameter.numel() for parameter in parameters), sparsity)
    with torch.no_grad():
        values = ops.magnitude_select(parameters, [0] * len(parameters), torch.full((1,), rank, device=first.device))
    return interpolate(values, fraction)


def _layer_reports(weights: list[PrunableWeight], sparsity: float) -> list[LayerReport]:
    """Counts by the operator's predicate (at T <= 0: of zeros); ties against the budget that the sparsity gives."""
    thresholds = [_first_layer(weight).feather.threshold for weight in weights]

    def magnitudes() -> Iterator[tuple[Tensor, Tensor]]:
        """Magnitudes in the compute dtype with their bound, one weight at a time to spare memory."""
        for weight, t in zip(weights, thresholds, strict=True):
            yield _parameter(weight).to(t.dtype).abs(), t.clamp_min(0)

    zeros = [int(torch.count_nonzero(a <= t)) for a, t in magnitudes()]
    largest = max(float(torch.where(a <= t, a, 0).max()) for a, t in magnitudes() if a.numel())
    smaller = [int(torch.count_nonzero(a < largest)) for a, _ in magnitudes()]
    total = sum(_parameter(weight).numel() for weight in weights)
    allowed = quantile_position(total, sparsity)[0] + 1 if sparsity > 0 else sum(zeros)
    allowed -= sum(smaller)  # how many of those at the largest pruned magnitude the budget asked for
    reports = []
    for index, weight in enumerate(weights):
        tied = zeros[index] - smaller[index]
        granted = min(max(allowed, 0), tied)
        allowed -= granted
        shape, value = tuple(_parameter(weight).shape), thresholds[index].item()
        reports.append(LayerReport(weight.name, shape, math.prod(shape), zeros[index], value, ties=tied - granted))
    return reports


def _first_layer(weight: PrunableWeight) -> SparseLayer:
    return cast(SparseLayer, weight.modules[0])


def _parameter(weight: PrunableWeight) -> Tensor:
    return _first_layer(weight).weight


def _list_skipped(skipped: list[SkippedLayer]) -> str:
    return "".join(f"; {layer.name}: {layer.reason}" for layer in skipped)
