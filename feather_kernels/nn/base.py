"""What every sparse layer shares: its state, P(weight), and moving along with the module.

A layer becomes sparse by a swap of its class. The module object, its Parameters, state_dict keys, hooks and
``isinstance`` relations stay as they were; the weight stays the dense, latent one that the optimizer updates.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from feather_kernels import autograd
from feather_kernels.nn.thresholds import WeightThreshold


class LayerState:
    """What a sparse layer knows beside its module's own attributes.

    Attributes:
        dense_class: the class to give back.
        thresholds: by the name of the parameter.
        reads: in the forward that this thread is running, P of the parameters read so far, by name and grad mode; None
            outside of one.
    """

    def __init__(self, dense_class: type[nn.Module], thresholds: dict[str, WeightThreshold]) -> None:
        self.dense_class = dense_class
        self.thresholds = thresholds
        self._running = threading.local()

    @property
    def reads(self) -> dict[tuple[str, bool], Tensor] | None:  # noqa: D102  (an attribute of the class docstring)
        return getattr(self._running, "reads", None)

    @reads.setter
    def reads(self, reads: dict[tuple[str, bool], Tensor] | None) -> None:
        self._running.reads = reads

    def __getstate__(self) -> dict[str, Any]:
        return {"dense_class": self.dense_class, "thresholds": self.thresholds}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]


class SparseLayer(nn.Module):
    """Mixin of every sparse layer.

    Attributes:
        feather: the state; an attribute of the instance, neither parameter, buffer nor submodule.
        recomputes: whether backward can compute P(weight) again, so that nothing is kept.
    """

    feather: LayerState
    recomputes = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ARG002
        raise TypeError(f"{type(self).__name__} cannot be built: Sparsifier makes it from the dense layer")

    def sparse_weight(self, name: str = "weight", dtype: torch.dtype | None = None) -> Tensor:
        """P of the named parameter, differentiable, in ``dtype`` (default the parameter's)."""
        threshold = self.feather.thresholds[name]
        return autograd.threshold(self.latent(name), threshold.threshold, threshold.grad_scale, threshold.power, dtype)

    def latent(self, name: str = "weight") -> Tensor:
        """The named parameter itself, also where the attribute of that name gives P of it."""
        return cast(Tensor, self._parameters[name])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        super()._apply(fn, recurse)
        self._follow()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._follow()  # torch.load may have put the weight on another device

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._follow()  # assign=True puts other tensors in the weight's place

    def _replicate_for_data_parallel(self) -> nn.Module:
        raise RuntimeError("sparse layers do not run under DataParallel: use DistributedDataParallel")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the dense class: the sparse classes of subclasses exist only at run time."""
        from feather_kernels.nn.conversion import empty_layer

        state = self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__
        return empty_layer, (self.feather.dense_class, type(self).form, tuple(self.feather.thresholds)), state

    def _follow(self) -> None:
        for name, threshold in self.feather.thresholds.items():
            threshold.follow(self.latent(name))

    form = ""  # how the dense class is extended: a key of ``conversion.FORMS``


def autocast_dtype(input: Tensor, weight: Tensor) -> torch.dtype | None:  # noqa: A002
    """The dtype that autocast gives to input and weight, or None where it is off or leaves them alone."""
    if (input.is_cpu or input.is_cuda) and not torch._C._is_any_autocast_enabled():  # which knows not every device
        return None
    device = input.device.type
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    if not input.is_floating_point() or torch.float64 in (input.dtype, weight.dtype):
        return None
    return torch.get_autocast_dtype(device)


def cast_for_autocast(
    input: Tensor,  # noqa: A002
    bias: Tensor | None,
    weight: Tensor,
) -> tuple[Tensor, Tensor | None, torch.dtype | None]:
    """Input and bias as autocast casts them, and the dtype for P(weight), None if it is the weight's own."""
    dtype = autocast_dtype(input, weight)
    if dtype is None:
        return input, bias, None
    bias = None if bias is None else bias.to(dtype)
    return input.to(dtype), bias, None if weight.dtype == dtype else dtype
