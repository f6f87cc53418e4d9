"""Warnings that the model does not, or will not, reach the requested sparsity."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from feather_kernels.sparsify.model_changes import ADDED
from feather_kernels.sparsify.schedules import Schedule, final_sparsity
from feather_kernels.user_warnings import warn_user

if TYPE_CHECKING:
    from feather_kernels.sparsify.prunable import PrunableWeight, WeightUse
    from feather_kernels.sparsify.report import Report


def warn_unless_reached(report: Report, schedule: Schedule, total_steps: int | None) -> None:
    """Warn if the schedule has not ended, zeros are missing, layers are empty, or layers were added to the model."""
    messages = _unfinished(report, schedule, total_steps), _missed(report, schedule), _empty(report), _added(report)
    for message in messages:
        if message is not None:
            warn_user(message)


def warn_of_thawed(frozen: list[WeightUse]) -> list[WeightUse]:
    """Warn about weights that stay dense because they were frozen, but train now; return those still frozen."""
    if not frozen:
        return frozen
    held = [(use, use.module._parameters.get(use.parameter_name)) for use in frozen]
    thawed = [use for use, parameter in held if parameter is not None and parameter.requires_grad]
    if thawed:
        warn_user(
            "weights that stay dense because they were frozen when the model was made sparse require a gradient now: "
            f"{', '.join(use.name for use in thawed)}. Unfreeze them before you make the model sparse, or name them in "
            "targets",
        )
    return [use for use in frozen if use not in thawed]


def warn_of_frozen(weights: Sequence[PrunableWeight]) -> None:
    """Warn about weights that are pruned though they were frozen after the model was made sparse."""
    frozen = [weight.name for weight in weights if not weight.parameter.requires_grad]
    if frozen:
        warn_user(
            "weights that were frozen after the model was made sparse are pruned, though they do not train: "
            f"{', '.join(frozen)}. To keep them as they are, freeze them before you make the model sparse, or name "
            "them in ignore; to prune them, name them in targets"
        )


def _unfinished(report: Report, schedule: Schedule, total_steps: int | None) -> str | None:
    final = final_sparsity(schedule)
    end = getattr(schedule, "end_step", total_steps)
    if final is not None and report.target_sparsity >= final:
        return None
    if final is None and (end is None or report.step >= end):
        return None
    planned = f"{report.step} steps" + ("" if end is None else f", and its schedule ends at step {end}")
    wanted = "the final sparsity of its schedule" if final is None else f"the final {final:.4%}"
    return (
        f"the sparsifier has counted {planned}: the model is {report.sparsity:.4%} sparse, not {wanted}. Call step() "
        "after every optimizer.step() (or attach() it) until the schedule ends, or plan fewer steps"
    )


def _missed(report: Report, schedule: Schedule) -> str | None:
    """A scope function, or weights that are NaN, may lead to fewer zeros than the schedule asks for."""
    if report.zeros >= report.budget - 0.005 * report.numel:  # other definitions of a quantile prune a few weights less
        return None
    return (
        f"the model has {report.zeros} zeros where {schedule} asks for {report.budget} at step {report.step}: either "
        "the thresholds of a scope function are too low, or weights are NaN"
    )


def _empty(report: Report) -> str | None:
    empty = [layer.name for layer in report.empty_layers]
    if not empty:
        return None
    names = ", ".join(empty[:5]) + (f" and {len(empty) - 5} more" if len(empty) > 5 else "")
    return (
        f"these layers have no weight left ({len(empty)} of {len(report.layers)}): {names}. min_density=0.01 keeps 1 % "
        "of the weights of every layer, at the same total sparsity"
    )


def _added(report: Report) -> str | None:
    added = [layer.name for layer in report.skipped if layer.reason == ADDED]
    if not added:
        return None
    return (
        f"layers that were added after the model was made sparse stay dense: {', '.join(added)}. Make the model sparse "
        "when it is complete"
    )
