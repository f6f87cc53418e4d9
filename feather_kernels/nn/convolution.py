"""Convolutions and transposed convolutions: torch's own op on P(weight)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from feather_kernels import autograd
from feather_kernels.nn.base import dense_without_state
from feather_kernels.nn.linear import RecomputingLayer


class ConvolutionLayer(RecomputingLayer):
    """Mixin of Conv1d, Conv2d, Conv3d; every argument (groups, dilation, padding_mode, "same") as in the dense."""

    @dense_without_state
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """(N, C_in, *) or (C_in, *) -> (N, C_out, *) or (C_out, *)."""
        layer: Any = self
        operands, lean = self._operands()
        if not lean:
            return layer._conv_forward(input, autograd.threshold(*operands), layer.bias)
        padding = layer.padding
        if layer.padding_mode != "zeros" or isinstance(padding, str):
            input, padding = _padded(layer, input)  # noqa: A001
        return autograd.lean_convolution(
            *(input, operands, layer.bias),
            *(layer.stride, padding, layer.dilation, False, layer.output_padding, layer.groups),
        )


class TransposedConvolutionLayer(RecomputingLayer):
    """Mixin of ConvTranspose1d, ConvTranspose2d, ConvTranspose3d."""

    transposed_convolution: Callable[..., Tensor]  # torch's function

    @dense_without_state
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002
        """(N, C_in, *) or (C_in, *) -> (N, C_out, *) or (C_out, *)."""
        layer: Any = self
        operands, lean = self._operands()
        output_padding = layer._output_padding(
            *(input, output_size, layer.stride, layer.padding, layer.kernel_size, len(layer.kernel_size)),
            layer.dilation,
        )
        if not lean:
            rest = layer.stride, layer.padding, output_padding, layer.groups, layer.dilation
            return type(self).transposed_convolution(input, autograd.threshold(*operands), layer.bias, *rest)
        return autograd.lean_convolution(
            *(input, operands, layer.bias),
            *(layer.stride, layer.padding, layer.dilation, True, output_padding, layer.groups),
        )


def _padded(layer: Any, input: Tensor) -> tuple[Tensor, tuple[int, ...]]:  # noqa: A002
    """The input, padded where the convolution itself cannot do it, and the padding that is left to it."""
    around, none = layer._reversed_padding_repeated_twice, (0,) * len(layer.kernel_size)
    if layer.padding_mode != "zeros":
        return F.pad(input, around, mode=layer.padding_mode), none
    if layer.padding == "same" and around[::2] != around[1::2]:
        return F.pad(input, around), none
    return input, none if layer.padding == "valid" else tuple(reversed(around[::2]))


class FeatherConv1d(ConvolutionLayer, nn.Conv1d):
    """``torch.nn.Conv1d`` with P(weight)."""


class FeatherConv2d(ConvolutionLayer, nn.Conv2d):
    """``torch.nn.Conv2d`` with P(weight)."""


class FeatherConv3d(ConvolutionLayer, nn.Conv3d):
    """``torch.nn.Conv3d`` with P(weight)."""


class FeatherConvTranspose1d(TransposedConvolutionLayer, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` with P(weight)."""

    transposed_convolution = torch.conv_transpose1d


class FeatherConvTranspose2d(TransposedConvolutionLayer, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` with P(weight)."""

    transposed_convolution = torch.conv_transpose2d


class FeatherConvTranspose3d(TransposedConvolutionLayer, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` with P(weight)."""

    transposed_convolution = torch.conv_transpose3d
