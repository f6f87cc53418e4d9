"""The linear layer, and what it shares with convolutions."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from feather_kernels import autograd
from feather_kernels.nn.base import SparseLayer, dense_without_state


class RecomputingLayer(SparseLayer):
    """Base class of the layers that replace torch's forward, so that backward can recompute P(weight)."""

    form = "forward"
    can_recompute = True

    def _operands(self) -> tuple[autograd.SparseWeight, bool]:
        """The operands of P(weight), in the dtype of autocast, and whether backward is to recompute it."""
        weight = self.latent()
        operands = self.operands("weight", autograd.autocast_dtype(weight))
        return operands, self.feather.thresholds["weight"].recomputes(weight, operands.dtype)


class FeatherLinear(RecomputingLayer, nn.Linear):
    """``torch.nn.Linear`` that multiplies by P(weight): ``y = x P(weight)^T + bias``.

    ``weight``, (out_features, in_features), is the latent weight: a Parameter as in the dense layer. It gets the
    gradient of P(weight), which is scaled where a weight is pruned. Backward keeps or recomputes P(weight), see
    ``Sparsifier``'s ``recompute``. Under autocast P(weight) is computed in autocast's dtype directly.

    Example:
        >>> layer = nn.Linear(8, 4)
        >>> sparsifier = fk.Sparsifier(layer, schedule=fk.ConstantSchedule(0.75))
        >>> layer
        FeatherLinear(in_features=8, out_features=4, bias=True, power=3, recompute=False)
        >>> x = torch.randn(2, 8)
        >>> torch.allclose(layer(x), x @ layer.sparse_weight().T + layer.bias)
        True
    """

    @dense_without_state
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name for it)
        """Compute ``input P(weight)^T + bias``.

        Args:
            input: (*, in_features).

        Returns:
            (*, out_features).
        """
        operands, recompute = self._operands()
        if recompute:
            return autograd.recomputing_linear(input, operands, self.bias)
        return F.linear(input, autograd.threshold(*operands), self.bias)
