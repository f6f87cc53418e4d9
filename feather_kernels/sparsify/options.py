"""Checks of the sparsifier's options, and the gradient scale as a function of the sparsity."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

from feather_kernels.checks import check_grad_scale, check_weight
from feather_kernels.dtypes import compute_dtype
from feather_kernels.sparsify.distributed.sharding import hint_at_fsdp1
from feather_kernels.sparsify.schedules import Schedule, final_sparsity

if TYPE_CHECKING:
    from feather_kernels.sparsify.layer_choice import SkippedLayer
    from feather_kernels.sparsify.policies import ScopeFunction
    from feather_kernels.sparsify.prunable import PrunableWeight

GradScale = float | str | Callable[[float], float]


def resolve_grad_scale(grad_scale: GradScale, schedule: Schedule) -> tuple[Callable[[float], float], bool]:
    """The gradient scale as a function of the current sparsity, and whether it changes during training."""
    if callable(grad_scale):
        return CheckedScale(grad_scale), True
    if isinstance(grad_scale, str):
        if grad_scale != "auto":
            raise ValueError(f'grad_scale must be a number of at least 0, a function or "auto", got {grad_scale!r}')
        final = final_sparsity(schedule)
        if final is None:
            raise ValueError(f'grad_scale "auto" needs a schedule with a final_sparsity, got {schedule}')
        grad_scale = 1.0 if final <= 0.95 else 0.5
    check_grad_scale(grad_scale)
    return ConstantScale(float(grad_scale)), False


@dataclass(frozen=True)
class ConstantScale:
    """The same gradient scale at every sparsity."""

    scale: float

    def __call__(self, sparsity: float) -> float:
        """The gradient scale at a sparsity."""
        del sparsity
        return self.scale


@dataclass(frozen=True)
class CheckedScale:
    """A user's function of the sparsity, whose values are checked to be finite and at least 0."""

    function: Callable[[float], float]

    def __call__(self, sparsity: float) -> float:
        """The gradient scale at a sparsity; raises ValueError or TypeError unless it is a gradient scale."""
        scale = self.function(sparsity)
        check_grad_scale(scale)
        return float(scale)


def check_model(model: object) -> None:
    """Raise TypeError unless ``model`` is a module; the message shows the right call."""
    if isinstance(model, nn.Module):
        return
    got = "None" if model is None else type(model).__name__
    call = "Sparsifier(model, ...) takes the module itself"
    if isinstance(model, type):
        got, call = f"the class {model.__name__}", "pass an instance of it"
    elif isinstance(model, Optimizer):
        call = "Sparsifier(model, ...) first, then sparsifier.attach(optimizer)"
    elif isinstance(model, Mapping):
        call = "load the state_dict into a module and pass the module"
    elif isinstance(model, Iterator):
        call = "Sparsifier(model, ...) takes the module, not its parameters(); targets=[...] chooses layers"
    elif isinstance(model, Sequence):
        call = "Sparsifier(model, ...) takes the module that contains them; targets=[...] chooses layers"
    raise TypeError(f"model must be a torch.nn.Module, got {got}: {call}")


def check_options(recompute: bool | None, capturable: bool, scope: str | ScopeFunction) -> None:
    """Raise ValueError or TypeError if an option has the wrong type or contradicts another."""
    if recompute is not None and not isinstance(recompute, bool):
        raise TypeError(f"recompute must be None, True or False, got {recompute!r}")
    if not isinstance(capturable, bool):
        raise TypeError(f"capturable must be True or False, got {capturable!r}")
    if capturable and callable(scope):
        raise ValueError(f"capturable=True needs a scope by name, got {scope!r}")


def check_any_prunable(weights: Sequence[PrunableWeight], skipped: Sequence[SkippedLayer], model: nn.Module) -> None:
    """Raise ValueError, with the reasons of all layers that stay dense, unless there is a weight to prune."""
    if sum(weight.parameter.numel() for weight in weights) == 0:
        reasons = "".join(f"; {layer.name}: {layer.reason}" for layer in skipped) + hint_at_fsdp1(model)
        raise ValueError(
            f"model must have a prunable layer, got none{reasons}; linear, convolution, attention and recurrent layers "
            "are taken by default; name others in targets"
        )


def check_dtypes(weights: Sequence[PrunableWeight]) -> None:
    """Raise TypeError if the ops do not support the dtype of a weight, or if only some weights are float64."""
    for weight in weights:
        check_weight(f"the weight of {weight.name}", weight.parameter)
        if compute_dtype(weight.parameter.dtype) != compute_dtype(weights[0].parameter.dtype):
            raise TypeError(
                f"all prunable weights must be float64 or none, got {weights[0].parameter.dtype} in {weights[0].name} "
                f"and {weight.parameter.dtype} in {weight.name}"
            )
