"""Multi-head attention: its projections are read as attributes, its output projection is a layer of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from feather_kernels.nn.base import dense_without_state
from feather_kernels.nn.weight_attribute import AttributeLayer, cached_reads


class FeatherMultiheadAttention(AttributeLayer, nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` on P of its projections, in its fast path too."""

    @dense_without_state
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the dense layer's."""
        with cached_reads(self.out_proj):
            return super().forward(*args, **kwargs)
