"""Multi-head attention: its projections are read as attributes, its output projection is a layer of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from feather_kernels.nn.weight_attribute import AttributeLayer, cached_reads


class FeatherMultiheadAttention(AttributeLayer, nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` on P of its projections, in its fast path too."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the dense layer's."""
        if "feather" not in self.__dict__:  # a bound method kept by somebody else, after finalize()
            return type(self).forward(self, *args, **kwargs)
        with cached_reads(self.out_proj):
            return super().forward(*args, **kwargs)
