"""Runs training scripts of the paper's repository (github.com/athglentis/feather) with one import changed.

Replace ``from sparse_utils import Pruner, get_params`` by an import of the same names from this module. Names,
arguments and call order are the repository's; the computation is this package's. Results differ where the repository's
code deviates from the paper or contradicts itself:

- Exactly ``floor((N - 1) s) + 1`` weights are zero, plus ties. In the repository the interpolated quantile may round
  up to the next magnitude, which is pruned then too.
- Forward, gradient, counts and the end prune by one predicate, ``abs(w) <= T``. In the repository forward compares
  cubes, and the gradient magnitudes. NaN weights stay NaN; in the repository they become 0.
- ``desparsify()`` writes P(w), with which the model has computed before. The repository keeps w where ``abs(w) > T``,
  so that the saved model is not the one that was evaluated. Here the threshold is selected from the weights of that
  moment: the sparsity is exact even if the last ``update_thresh(end_of_batch=True)`` is missing.
- Convolutions keep their ``dilation`` and ``padding_mode``, which the repository loses.
- Every linear, convolution, attention and recurrent layer is pruned, including subclasses and the model itself, and
  tied weights once. The repository prunes exact ``nn.Conv2d`` and ``nn.Linear`` inside the model only.
- ``state_dict`` keys, modules and Parameters stay as they are, so that checkpoints of the dense model load; and the
  pruner has a ``state_dict`` from which a training resumes.
- Steps after ``nbatches * epochs`` keep the final sparsity; in the repository they raise IndexError.
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
    """Prunes a model with Feather along a cubic ramp that ends after half of the training.

    A script calls ``update_thresh()`` before every forward pass, ``update_thresh(end_of_batch=True)`` after the last
    optimizer step of an epoch and before the evaluation, and ``desparsify()`` at the end.

    Args:
        model: the network to train.
        device: only checked; thresholds are computed on the device of the weights.
        final_rate: final sparsity, a fraction of zeros in [0, 1). If it is above 0.95, pruned weights get half of
            their gradient (the paper's theta), else all of it.
        nbatches: optimizer steps in an epoch.
        epochs: number of epochs; the ramp ends at step ``nbatches * epochs // 2``.
        pthres: layers whose weight has fewer elements stay dense.
        t1: epoch, counted from 0, at which the ramp begins.

    Attributes:
        sparsifier: the Sparsifier that does the work; its ``report()`` has details.

    Raises:
        ValueError, TypeError: an argument is out of range or has the wrong type, or ``pthres`` leaves no layer.

    Example:
        >>> from feather_kernels.integrations.feather_reference import Pruner
        >>> model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> pruner = Pruner(model, "cpu", final_rate=0.9, nbatches=5, epochs=4)
        >>> for _ in range(20):
        ...     pruner.update_thresh()
        ...     loss = model(torch.randn(8, 64)).square().mean()
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> pruner.desparsify()
        >>> round(sum(int((model[i].weight == 0).sum()) for i in (0, 2)) / (2048 + 320), 2)
        0.9
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
        """Select the threshold from the current weights.

        The first call selects at step 0 of the schedule, every further one at the next step.

        Args:
            end_of_batch: select at the same step as the call before; for an evaluation after an optimizer step.

        Raises:
            RuntimeError: ``desparsify()`` was called before, or a weight was trained without its layer's forward.
        """
        if self._has_begun and not end_of_batch:
            self.sparsifier.step()
        else:
            self.sparsifier.refresh()
        self._has_begun = self._has_begun or not end_of_batch

    def print_sparsity(self) -> float:
        """Print the report of the sparsifier, and return the total sparsity in percent."""
        report = self.sparsifier.report()
        print(report)
        return 100 * report.sparsity

    def desparsify(self) -> None:
        """Write the sparse weights into the model and give its layers their dense classes back."""
        self.sparsifier.finalize()

    def state_dict(self) -> dict[str, Any]:
        """The state from which a training resumes; an addition to the repository's Pruner."""
        return {**self.sparsifier.state_dict(), "has_begun": self._has_begun}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            state: what ``state_dict()`` returned.

        Raises:
            ValueError: the state is not a Pruner's, or belongs to other layers; nothing is changed then.
        """
        if not isinstance(state.get("has_begun"), bool):
            raise ValueError(f"state must be a Pruner's state_dict(), with the key has_begun, got keys {sorted(state)}")
        self.sparsifier.load_state_dict(state)
        self._has_begun = state["has_begun"]


def get_params(model: nn.Module) -> tuple[list[Parameter], list[Parameter]]:
    """Divide the parameters of a model into those with weight decay and those without.

    Args:
        model: the network.

    Returns:
        The parameters with weight decay; and those without, which belong to batch norms or have ``bias`` in their
        names.

    Example:
        >>> from feather_kernels.integrations.feather_reference import get_params
        >>> decayed, free = get_params(nn.Sequential(nn.Linear(8, 4), nn.BatchNorm1d(4)))
        >>> len(decayed), len(free)
        (1, 3)
    """
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
