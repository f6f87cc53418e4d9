"""The linear layer, and what it shares with convolutions: torch's own op on P(weight)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from feather_kernels import autograd
from feather_kernels.nn.base import SparseLayer, dense_without_state


class RecomputingLayer(SparseLayer):
    """Mixin of the layers whose forward is ours."""

    form = "forward"
    lean_form = True

    def _operands(self) -> tuple[autograd.SparseWeight, bool]:
        """What P(weight) is computed from, in the dtype of autocast, and whether the lean form is to run."""
        weight = self.latent()
        operands = self.operands("weight", autograd.autocast_dtype(weight))
        return operands, self.feather.thresholds["weight"].recomputes(weight, operands.dtype)


class FeatherLinear(RecomputingLayer, nn.Linear):
    """``torch.nn.Linear`` that computes ``x P(weight)^T + bias``."""

    @dense_without_state
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name for it)
        """(*, in_features) -> (*, out_features)."""
        operands, lean = self._operands()
        if lean:
            return autograd.lean_linear(input, operands, self.bias)
        return F.linear(input, autograd.threshold(*operands), self.bias)
