"""Multi-head attention: its projections are weight attributes, its output projection is a layer of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from feather_kernels.nn.base import dense_without_state
from feather_kernels.nn.weight_attribute import AttributeLayer, cached_reads


class FeatherMultiheadAttention(AttributeLayer, nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` that projects queries, keys, values and heads by P(weight).

    ``head_i = attention(q P(W_q)_i^T, k P(W_k)_i^T, v P(W_v)_i^T)`` and ``y = concat(head_1, ...) P(W_o)^T``, plus
    biases. Shapes and arguments are torch's, and so is the fast path of inference. The attribute ``in_proj_weight``,
    (3 embed_dim, embed_dim), or ``q_proj_weight``, ``k_proj_weight`` and ``v_proj_weight`` if kdim or vdim differ,
    return P of the Parameter; ``latent(name)`` returns the Parameter itself. ``out_proj`` is a sparse layer too.

    Example:
        >>> attention = nn.MultiheadAttention(16, num_heads=4, batch_first=True)
        >>> sparsifier = fk.Sparsifier(attention, schedule=fk.ConstantSchedule(0.75))
        >>> x = torch.randn(2, 5, 16)
        >>> attention(x, x, x)[0].shape
        torch.Size([2, 5, 16])
        >>> int((attention.in_proj_weight == 0).sum() + (attention.out_proj.weight == 0).sum()) == 1024 * 3 // 4
        True
    """

    @dense_without_state
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the dense layer's forward, on P of the projections."""
        with cached_reads(self.out_proj):
            return super().forward(*args, **kwargs)
