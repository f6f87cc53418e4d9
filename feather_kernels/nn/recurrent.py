"""Recurrent layers, which read a list of their weights: the list holds P of them during forward."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from feather_kernels.nn.base import SparseLayer, dense_without_state


class RecurrentLayer(SparseLayer):
    """Mixin of LSTM, GRU and RNN; every cell weight is thresholded."""

    form = "recurrent"

    @dense_without_state
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the dense layer's."""
        layer: Any = self
        # another thread must not find the list exchanged, or change it back; a compiler cannot take a lock
        with nullcontext() if torch.compiler.is_compiling() else self.feather.lock:
            layer._update_flat_weights()  # sees replaced Parameters; else torch would after the exchange
            names = layer._flat_weights_names
            layer._flat_weights = [
                self.sparse_weight(name) if name in self.feather.thresholds else self._parameters[name]
                for name in names
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
