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
        weight = self.latent()
        operands = self.operands("weight", autograd.autocast_dtype(weight))
        if self.feather.thresholds["weight"].recomputes(weight, operands.dtype):
            return autograd.lean_linear(input, operands, self.bias)
        return F.linear(input, autograd.threshold(*operands), self.bias)
