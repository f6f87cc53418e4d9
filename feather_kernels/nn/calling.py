"""Layers whose forward is ours: linear and convolution, with P(weight) computed again in backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feather_kernels import autograd
from feather_kernels.nn.base import SparseLayer, cast_for_autocast


class CallLayer(SparseLayer):
    """Mixin: the forward computes with P(weight); with save="keep" it is kept for backward instead."""

    form = "call"
    recomputes = True

    def _weight_and_bias(self) -> tuple[Tensor, Tensor | None]:
        """The attributes; past ``nn.Module.__getattr__``, which takes 10 us each where caches are cold."""
        layer: Any = self
        parameters = layer._parameters
        if "weight" in parameters and "bias" in parameters:
            return parameters["weight"], parameters["bias"]
        return layer.weight, layer.bias  # one of them is computed: parametrized, pruned, ...


class FeatherLinear(CallLayer, nn.Linear):
    """``torch.nn.Linear`` that computes ``x P(weight)^T + bias``."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  (torch's name for it)
        """(*, in_features) -> (*, out_features)."""
        weight, bias = self._weight_and_bias()
        x, bias, dtype = cast_for_autocast(input, bias, weight)
        t = self.feather.thresholds["weight"]
        if t.keep:
            return F.linear(x, self.sparse_weight("weight", dtype), bias)
        return autograd.linear(x, weight, t.threshold, t.grad_scale, bias, t.power, dtype)


class FeatherConvNd(CallLayer):
    """Mixin of the convolutions, of any dimension and direction."""

    def _convolve(self, input: Tensor, padding: Any, transposed: bool, output_padding: Any) -> Tensor:  # noqa: A002
        layer: Any = self
        weight, bias = self._weight_and_bias()
        x, bias, dtype = cast_for_autocast(input, bias, weight)
        batched = x.dim() == weight.dim()
        x = x if batched else x.unsqueeze(0)
        arguments = (layer.stride, padding, layer.dilation, transposed, output_padding, layer.groups)
        t = self.feather.thresholds["weight"]
        if t.keep:
            y = torch.convolution(x, self.sparse_weight("weight", dtype), bias, *arguments)
        else:
            y = autograd.convolution(x, weight, t.threshold, t.grad_scale, bias, t.power, dtype, *arguments)
        return y if batched else y.squeeze(0)


class FeatherForwardConv(FeatherConvNd):
    """Mixin of Conv1d, Conv2d, Conv3d; every argument (groups, dilation, padding_mode, "same") as in the dense."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """(N, C_in, *) or (C_in, *) -> (N, C_out, *) or (C_out, *)."""
        layer: Any = self
        padding = layer.padding
        if layer.padding_mode != "zeros" or isinstance(padding, str):
            input, padding = _padded(layer, input)  # noqa: A001
        return self._convolve(input, padding, False, layer.output_padding)


class FeatherTransposedConv(FeatherConvNd):
    """Mixin of ConvTranspose1d, ConvTranspose2d, ConvTranspose3d."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002
        """(N, C_in, *) or (C_in, *) -> (N, C_out, *) or (C_out, *)."""
        layer: Any = self
        output_padding = layer._output_padding(
            *(input, output_size, layer.stride, layer.padding, layer.kernel_size, len(layer.kernel_size)),
            layer.dilation,
        )
        return self._convolve(input, layer.padding, True, output_padding)


def _padded(layer: Any, input: Tensor) -> tuple[Tensor, tuple[int, ...]]:  # noqa: A002
    """The input, padded where the convolution itself cannot do it, and the padding that is left to it."""
    around, none = layer._reversed_padding_repeated_twice, (0,) * len(layer.kernel_size)
    if layer.padding_mode != "zeros":
        return F.pad(input, around, mode=layer.padding_mode), none
    if layer.padding == "same" and around[::2] != around[1::2]:
        return F.pad(input, around), none
    return input, none if layer.padding == "valid" else tuple(reversed(around[::2]))


class FeatherConv1d(FeatherForwardConv, nn.Conv1d):
    """``torch.nn.Conv1d`` with P(weight)."""


class FeatherConv2d(FeatherForwardConv, nn.Conv2d):
    """``torch.nn.Conv2d`` with P(weight)."""


class FeatherConv3d(FeatherForwardConv, nn.Conv3d):
    """``torch.nn.Conv3d`` with P(weight)."""


class FeatherConvTranspose1d(FeatherTransposedConv, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` with P(weight)."""


class FeatherConvTranspose2d(FeatherTransposedConv, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` with P(weight)."""


class FeatherConvTranspose3d(FeatherTransposedConv, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` with P(weight)."""
