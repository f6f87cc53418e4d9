"""Layers whose weight is read as an attribute; the attribute returns P(weight).

The Parameter stays in ``_parameters``, where optimizers, ``state_dict`` and ``parameters()`` see it. P(weight) is an
intermediate result that autograd keeps for backward; it refuses writes (``read_only_weight``).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from feather_kernels import autograd
from feather_kernels.nn.base import SparseLayer, dense_without_state
from feather_kernels.nn.dtensor import is_dtensor
from feather_kernels.nn.read_only_weight import computed_weight


class AttributeLayer(SparseLayer):
    """Base class of layers with attributes made by ``thresholded``; each P is computed once per forward."""

    form = "attribute"

    @dense_without_state
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the dense class's forward, which reads P(weight)."""
        with cached_reads(self):
            return super().forward(*args, **kwargs)


def thresholded(name: str, casts: bool) -> property:
    """Make a property that returns P of a parameter, or None if the module has no such parameter.

    Args:
        name: name of the parameter.
        casts: whether P has autocast's dtype under autocast; only for weights that only matrix products read.
    """

    def read(self: SparseLayer) -> Tensor | None:
        parameter = self._parameters.get(name)
        if name not in self.feather.thresholds or is_dtensor(parameter):  # FSDP2 reads what it manages, shards too
            return parameter
        dtype = autograd.autocast_dtype(self.latent(name)) if casts else None
        if torch.compiler.is_compiling():  # a compiler merges equal calls itself
            return self.sparse_weight(name, dtype)
        reads = self.feather.reads
        if reads is None:
            return computed_weight(self.sparse_weight(name, dtype), self, name)
        key = name, torch.is_grad_enabled(), dtype  # a result without a graph must not serve a read that needs one
        if key not in reads:
            reads[key] = computed_weight(self.sparse_weight(name, dtype), self, name)
        return reads[key]

    return property(read)


@contextmanager
def cached_reads(layer: nn.Module) -> Iterator[None]:
    """Cache P of each parameter for one forward; does nothing to layers of other forms."""
    if torch.compiler.is_compiling() or not isinstance(layer, AttributeLayer) or layer.feather.reads is not None:
        yield
        return
    layer.feather.reads = {}
    try:
        yield
    finally:
        layer.feather.reads = None
