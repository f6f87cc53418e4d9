"""The linear layer, and what it shares with convolutions: torch's own op on P(weight)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from feather_kernels import autograd
from feather_kernels.nn.base import SparseLayer, autocast_dtype


class CalledLayer(SparseLayer):
    """Mixin of the layers whose forward is ours."""

    form = "call"
    lean_form = True


class FeatherLinear(CalledLayer, nn.Linear):
    """``torch.nn.Linear`` that computes ``x P(weight)^T + bias``."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name for it)
        """(*, in_features) -> (*, out_features)."""
        if "feather" not in self.__dict__:  # a bound method kept by somebody else, after finalize()
            return type(self).forward(self, input)
        weight, t = self.weight, self.feather.thresholds["weight"]
        dtype = autocast_dtype(weight)
        if t.recomputes(weight, dtype):
            return autograd.lean_linear(input, weight, t.value, t.grad_scale, self.bias, t.power, dtype)
        return F.linear(input, autograd.threshold(weight, t.value, t.grad_scale, t.power, dtype), self.bias)
