"""Layers whose own or whose parent's forward reads the weight: the attribute gives P of the parameter.

The Parameter stays in ``_parameters``: optimizers, ``state_dict`` and ``parameters()`` see it as before. P(weight) is
an ordinary intermediate, kept for backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from feather_kernels.nn.base import SparseLayer


class ReadLayer(SparseLayer):
    """Mixin: attributes made by ``thresholded`` give P of the parameter, computed once in a forward of the layer."""

    form = "read"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The dense class's forward, on P(weight)."""
        with one_read(self):
            return super().forward(*args, **kwargs)


class FeatherMultiheadAttention(ReadLayer, nn.MultiheadAttention):
    """``torch.nn.MultiheadAttention`` on P of its projections, in its fast path too; out_proj is a layer of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the dense layer's."""
        with one_read(self.out_proj):
            return super().forward(*args, **kwargs)


class RecurrentLayer(SparseLayer):
    """Mixin of LSTM, GRU and RNN, which read a list of their weights; every cell weight is thresholded."""

    form = "recurrent"

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the dense layer's."""
        layer: Any = self
        layer._update_flat_weights()  # sees Parameters that were replaced; else torch would do so after the exchange
        names = layer._flat_weights_names
        layer._flat_weights = [
            self.sparse_weight(name) if name in self.feather.thresholds else self._parameters[name] for name in names
        ]
        try:
            return super().forward(*args, **kwargs)
        finally:
            layer._flat_weights = [self._parameters[name] for name in names]


class FeatherLSTM(RecurrentLayer, nn.LSTM):
    """``torch.nn.LSTM`` on P of its weights."""


class FeatherGRU(RecurrentLayer, nn.GRU):
    """``torch.nn.GRU`` on P of its weights."""


class FeatherRNN(RecurrentLayer, nn.RNN):
    """``torch.nn.RNN`` on P of its weights."""


def thresholded(name: str) -> property:
    """Property that gives P of the parameter ``name``; None where the module has none."""

    def read(self: SparseLayer) -> Tensor | None:
        if name not in self.feather.thresholds:
            return self._parameters[name]
        reads = None if torch.compiler.is_compiling() else self.feather.reads  # a compiler merges equal calls itself
        if reads is None:
            return self.sparse_weight(name)
        key = name, torch.is_grad_enabled()  # what was read without a graph must not serve a read that needs one
        if key not in reads:
            reads[key] = self.sparse_weight(name)
        return reads[key]

    return property(read)


@contextmanager
def one_read(layer: nn.Module) -> Iterator[None]:
    """Within it, P of each parameter of the layer is computed at most once; nothing if the layer is dense."""
    if torch.compiler.is_compiling() or not isinstance(layer, ReadLayer) or layer.feather.reads is not None:
        yield
        return
    layer.feather.reads = {}
    try:
        yield
    finally:
        layer.feather.reads = None
