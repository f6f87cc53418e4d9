"""Recurrent layers: while forward runs, the list of weights that torch reads holds P of them."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from feather_kernels.nn.base import SparseLayer, dense_without_state


class RecurrentLayer(SparseLayer):
    """Base class of LSTM, GRU and RNN, all of whose weight matrices are thresholded."""

    form = "recurrent"

    @dense_without_state
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the dense layer's forward, on P of the weights."""
        layer: Any = self
        # another thread must not find the exchanged list, or change it back; a compiler cannot take a lock
        with nullcontext() if torch.compiler.is_compiling() else self.feather.lock:
            layer._update_flat_weights()  # notices replaced Parameters; torch would do so after the exchange
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
    """``torch.nn.LSTM`` whose gates multiply by P(weight): ``P(W_ih) x_t + b_ih + P(W_hh) h_(t-1) + b_hh``.

    Every ``weight_ih_l*``, (4 hidden_size, input_size), ``weight_hh_l*``, (4 hidden_size, hidden_size), and with
    ``proj_size`` ``weight_hr_l*`` is thresholded; biases are not. These attributes stay the latent weights. P of them
    is kept for backward. Arguments, shapes and results are otherwise torch's.

    Example:
        >>> layer = nn.LSTM(6, 8, num_layers=2, batch_first=True)
        >>> sparsifier = fk.Sparsifier(layer, schedule=fk.ConstantSchedule(0.5))
        >>> output, (h, c) = layer(torch.randn(3, 7, 6))
        >>> output.shape, h.shape, [weight.name for weight in sparsifier.weights][:2]
        (torch.Size([3, 7, 8]), torch.Size([2, 3, 8]), ['weight_ih_l0', 'weight_hh_l0'])
    """


class FeatherGRU(RecurrentLayer, nn.GRU):
    """``torch.nn.GRU`` whose gates multiply by P(weight): ``P(W_ih) x_t + b_ih`` and ``P(W_hh) h_(t-1) + b_hh``.

    Every ``weight_ih_l*``, (3 hidden_size, input_size), and ``weight_hh_l*``, (3 hidden_size, hidden_size), is
    thresholded; see ``FeatherLSTM``.

    Example:
        >>> layer = nn.GRU(6, 8, bidirectional=True)
        >>> sparsifier = fk.Sparsifier(layer, schedule=fk.ConstantSchedule(0.5))
        >>> layer(torch.randn(7, 3, 6))[0].shape
        torch.Size([7, 3, 16])
    """


class FeatherRNN(RecurrentLayer, nn.RNN):
    """``torch.nn.RNN`` on P(weight): ``h_t = tanh(P(W_ih) x_t + b_ih + P(W_hh) h_(t-1) + b_hh)``, or relu.

    Every ``weight_ih_l*``, (hidden_size, input_size), and ``weight_hh_l*``, (hidden_size, hidden_size), is
    thresholded; see ``FeatherLSTM``.

    Example:
        >>> layer = nn.RNN(6, 8, nonlinearity="relu")
        >>> sparsifier = fk.Sparsifier(layer, schedule=fk.ConstantSchedule(0.5))
        >>> sparsifier.finalize()
        RNN(6, 8)
        >>> sum(int((weight == 0).sum()) for weight in (layer.weight_ih_l0, layer.weight_hh_l0))
        56
    """
