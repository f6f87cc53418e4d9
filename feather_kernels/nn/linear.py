"""The linear layer, and what it shares with convolutions: torch's own op on P(weight)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from feather_kernels import autograd
from feather_kernels.nn.base import SparseLayer, dense_without_state


class CalledLayer(SparseLayer):
    """Mixin of the layers whose forward is ours."""

    form = "call"
    lean_form = True


class FeatherLinear(CalledLayer, nn.Linear):
    """``torch.nn.Linear`` that computes ``x P(weight)^T + bias``."""

    @dense_without_state
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name for it)
        """(*, in_features) -> (*, out_features)."""
        weight, t = self.weight, self.feather.thresholds["weight"]
        dtype = autograd.autocast_dtype(weight)
        if t.recomputes(weight, dtype):
            return autograd.lean_linear(input, weight, t.value, t.grad_scale, self.bias, t.power, dtype)
        return F.linear(input, self.sparse_weight("weight", dtype), self.bias)
