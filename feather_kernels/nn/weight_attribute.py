"""Layers whose weight is read as an attribute; the attribute returns P(weight).

The Parameter stays in ``_parameters``: optimizers, ``state_dict`` and ``parameters()`` see it as before. P(weight) is
an ordinary intermediate, kept for backward, that refuses writes (``read_only``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from feather_kernels import autograd
from feather_kernels.nn.base import SparseLayer, dense_without_state
from feather_kernels.nn.read_only_weight import computed_weight


class AttributeLayer(SparseLayer):
    """Mixin: attributes made by ``thresholded`` return P of the parameter, computed once in a forward of the layer."""

    form = "attribute"

    @dense_without_state
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The dense class's forward, on P(weight)."""
        with cached_reads(self):
            return super().forward(*args, **kwargs)


def thresholded(name: str, casts: bool) -> property:
    """Property that returns P of the parameter ``name``; None where the module has none.

    With ``casts`` it is in the dtype of autocast, for weights that nothing but matrix products read.
    """

    def read(self: SparseLayer) -> Tensor | None:
        if name not in self.feather.thresholds:
            return self._parameters[name]
        dtype = autograd.autocast_dtype(self.latent(name)) if casts else None
        if torch.compiler.is_compiling():  # a compiler merges equal calls itself
            return self.sparse_weight(name, dtype)
        reads = self.feather.reads
        if reads is None:
            return computed_weight(self.sparse_weight(name, dtype), self, name)
        key = name, torch.is_grad_enabled(), dtype  # what was read without a graph must not serve a read that needs one
        if key not in reads:
            reads[key] = computed_weight(self.sparse_weight(name, dtype), self, name)
        return reads[key]

    return property(read)


@contextmanager
def cached_reads(layer: nn.Module) -> Iterator[None]:
    """Caches P of each parameter for one forward. No-op on layers of other forms."""
    if torch.compiler.is_compiling() or not isinstance(layer, AttributeLayer) or layer.feather.reads is not None:
        yield
        return
    layer.feather.reads = {}
    try:
        yield
    finally:
        layer.feather.reads = None
