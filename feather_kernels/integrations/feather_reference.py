"""Training scripts of the paper's repository (github.com/athglentis/feather) run with one import changed.

There ``from sparse_utils import Pruner, get_params``; here the same names from this module. The names, arguments and
call order are those of that repository; what they compute is ours, by the rules of the rest of this package. So a
script's results differ from those of the repository where its code differs from the paper or from itself:

- The threshold's position is exact: ``floor((N - 1) s) + 1`` weights are zero, and ties. There the interpolated
  quantile may round up to the next magnitude, which then goes too.
- One predicate, ``abs(w) <= T``, for forward, gradient, counts and the end. There the forward compares cubes, the
  gradient magnitudes. NaN weights stay NaN; there they become 0.
- ``desparsify()`` writes P(w), what the model computed with until then; there it keeps w itself where ``abs(w) > T``,
  so that the saved model is another one than the one evaluated. It selects the threshold from the weights as they are
  then: the sparsity is exact even if the last ``update_thresh(end_of_batch=True)`` was left out.
- Convolutions keep their ``dilation`` and ``padding_mode``, which are lost there.
- Every linear, convolution, attention and recurrent layer is taken, subclasses and the model itself too, tied weights
  once; there only exact ``nn.Conv2d`` and ``nn.Linear`` below the model.
- ``state_dict`` keys, modules and Parameters stay as they are, so checkpoints of the dense model load, and the pruner
  has a ``state_dict`` of its own to resume from.
- Steps beyond ``nbatches * epochs`` keep the final sparsity; there they raise IndexError.
"""

from __future__ import annotations

import numbers
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from feather_kernels.checks import check_number, check_sparsity
from feather_kernels.sparsify import CubicSchedule, Sparsifier

if TYPE_CHECKING:
    from torch.nn.parameter import Parameter

__all__ = ["Pruner", "get_params"]


class Pruner:
    """Global magnitude pruning with Feather along a cubic ramp that ends at half of the training.

    In a script: ``update_thresh()`` before every forward pass, ``update_thresh(end_of_batch=True)`` after the last
    optimizer step of an epoch, before the evaluation; ``desparsify()`` at the end.

    Args:
        model: the network to train.
        device: for the signature's sake: the thresholds are computed where the weights are, without a copy of them.
        final_rate: final sparsity, a fraction of zeros in [0, 1). Pruned weights get half of their gradient where it is
            above 0.95 (the paper's theta), all of it otherwise.
        nbatches: optimizer steps in an epoch.
        epochs: number of epochs; the ramp ends at step ``nbatches * epochs // 2``.
        pthres: layers whose weight has fewer elements stay dense.
        t1: epoch, counted from 0, at which the ramp begins.

    Attributes:
        sparsifier: what does the work; its ``report()`` says more than ``print_sparsity()`` returns.

    Raises:
        ValueError, TypeError: an argument is out of range or of the wrong type, or ``pthres`` leaves no layer.
    """

    def __init__(
        self,
        model: nn.Module,
        device: torch.device | str | int,
        final_rate: float,
        nbatches: int,
        epochs: int,
        pthres: int = 0,
        t1: int = 0,
    ) -> None:
        _check_device(device)
        check_sparsity("final_rate", final_rate)
        _check_count("nbatches", nbatches, 1)
        _check_count("epochs", epochs, 1)
        _check_count("pthres", pthres, 0)
        _check_count("t1", t1, 0)
        if t1 >= epochs:
            raise ValueError(f"t1 must be below epochs ({epochs}), got {t1}: nothing would be pruned (final_rate=0?)")
        begin = t1 * nbatches
        schedule = CubicSchedule(final_rate, begin, max(begin, nbatches * epochs // 2))
        self.sparsifier = Sparsifier(model, schedule=schedule, min_numel=pthres)
        self._has_begun = False

    def update_thresh(self, end_of_batch: bool = False) -> None:
        """Select the threshold from the weights as they are now.

        Each call belongs to the next step of the schedule, the first one to step 0. With ``end_of_batch`` it belongs to
        the same step as the call before and the schedule stays: for evaluation after an optimizer step.

        Raises:
            RuntimeError: after ``desparsify()``; or in the second call, if some sparse layer's forward has not run.
        """
        if self._has_begun and not end_of_batch:
            self.sparsifier.step()
        else:
            self.sparsifier.refresh()
        self._has_begun = self._has_begun or not end_of_batch

    def print_sparsity(self) -> float:
        """Print the sparsity of each layer and of all of them; return the latter in percent."""
        report = self.sparsifier.report()
        print(report)
        return 100 * report.sparsity

    def desparsify(self) -> None:
        """Write the sparse weights into the model and give its layers their plain classes back."""
        self.sparsifier.finalize()

    def state_dict(self) -> dict[str, Any]:
        """The sparsifier's state and whether the schedule has begun; the repository has no such thing."""
        return {**self.sparsifier.state_dict(), "has_begun": self._has_begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where ``state_dict()`` was taken.

        Raises:
            ValueError: the state is not a Pruner's, or belongs to other layers. Nothing is changed then.
        """
        if not isinstance(state.get("has_begun"), bool):
            raise ValueError(f"state must be that of a Pruner, with has_begun, got {sorted(state)}")
        self.sparsifier.load_state_dict(state)
        self._has_begun = state["has_begun"]


def get_params(model: nn.Module) -> tuple[list[Parameter], list[Parameter]]:
    """Parameters with weight decay and those without: those of batch norms and those with ``bias`` in their name."""
    norms = {
        parameter for module in model.modules() if isinstance(module, _BatchNorm) for parameter in module.parameters()
    }
    decayed: list[Parameter] = []
    free: list[Parameter] = []
    for name, parameter in model.named_parameters():
        (free if parameter in norms or "bias" in name else decayed).append(parameter)
    return decayed, free


def _check_count(name: str, value: int, least: int) -> None:
    check_number(name, value, numbers.Integral)
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def _check_device(device: object) -> None:
    try:
        torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device must be a torch.device, its name or its index, got {device!r}") from error
