"""Convolutions and transposed convolutions: torch's ops on P(weight)."""

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
    """Base class of the convolutions; every argument (groups, dilation, padding_mode, "same") works as in torch."""

    @dense_without_state
    def forward(self, input: Tensor) -> Tensor:  # noqa: A002
        """Convolve the input with P(weight).

        Args:
            input: (N, C_in, *) or (C_in, *), with one size for each dimension of the kernel.

        Returns:
            (N, C_out, *) or (C_out, *).
        """
        layer: Any = self
        operands, recompute = self._operands()
        if not recompute:
            return layer._conv_forward(input, autograd.threshold(*operands), layer.bias)
        padding = layer.padding
        if layer.padding_mode != "zeros" or isinstance(padding, str):
            input, padding = _padded(layer, input)  # noqa: A001
        return autograd.recomputing_convolution(
            *(input, operands, layer.bias),
            *(layer.stride, padding, layer.dilation, False, layer.output_padding, layer.groups),
        )


class TransposedConvolutionLayer(RecomputingLayer):
    """Base class of the transposed convolutions.

    Attributes:
        transposed_convolution: torch's function.
    """

    transposed_convolution: Callable[..., Tensor]

    @dense_without_state
    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:  # noqa: A002
        """Convolve the input with the transpose of P(weight).

        Args:
            input: (N, C_in, *) or (C_in, *), with one size for each dimension of the kernel.
            output_size: sizes of the result where the stride leaves a choice; None means the smallest.

        Returns:
            (N, C_out, *) or (C_out, *).
        """
        layer: Any = self
        operands, recompute = self._operands()
        output_padding = layer._output_padding(
            *(input, output_size, layer.stride, layer.padding, layer.kernel_size, len(layer.kernel_size)),
            layer.dilation,
        )
        if not recompute:
            rest = layer.stride, layer.padding, output_padding, layer.groups, layer.dilation
            return type(self).transposed_convolution(input, autograd.threshold(*operands), layer.bias, *rest)
        return autograd.recomputing_convolution(
            *(input, operands, layer.bias),
            *(layer.stride, layer.padding, layer.dilation, True, output_padding, layer.groups),
        )


def _padded(layer: Any, input: Tensor) -> tuple[Tensor, tuple[int, ...]]:  # noqa: A002
    """Pad the input as far as the convolution itself cannot; return it and the padding left to the convolution."""
    around, none = layer._reversed_padding_repeated_twice, (0,) * len(layer.kernel_size)
    if layer.padding_mode != "zeros":
        return F.pad(input, around, mode=layer.padding_mode), none
    if layer.padding == "same" and around[::2] != around[1::2]:
        return F.pad(input, around), none
    return input, none if layer.padding == "valid" else tuple(reversed(around[::2]))


class FeatherConv1d(ConvolutionLayer, nn.Conv1d):
    """``torch.nn.Conv1d`` with P(weight): ``y = conv1d(x, P(weight)) + bias``.

    (N, C_in, L) -> (N, C_out, L_out), with or without N; ``weight``, (C_out, C_in / groups, k), is the
    latent weight. All arguments of torch's layer keep their meaning. Backward keeps or recomputes P(weight), as in
    ``FeatherLinear``.

    Example:
        >>> layer = nn.Conv1d(4, 8, kernel_size=3, padding=1, padding_mode="circular")
        >>> sparsifier = fk.Sparsifier(layer, schedule=fk.ConstantSchedule(0.5))
        >>> layer(torch.randn(2, 4, 7)).shape
        torch.Size([2, 8, 7])
    """


class FeatherConv2d(ConvolutionLayer, nn.Conv2d):
    """``torch.nn.Conv2d`` with P(weight): ``y = conv2d(x, P(weight)) + bias``.

    (N, C_in, H, W) -> (N, C_out, H_out, W_out), with or without N; ``weight``, (C_out, C_in / groups, k_H, k_W), is the
    latent weight. All arguments of torch's layer keep their meaning. Backward keeps or recomputes P(weight), as in
    ``FeatherLinear``.

    Example:
        >>> layer = nn.Conv2d(4, 8, kernel_size=3, padding="same", groups=2)
        >>> sparsifier = fk.Sparsifier(layer, schedule=fk.ConstantSchedule(0.5))
        >>> layer(torch.randn(2, 4, 7, 7)).shape
        torch.Size([2, 8, 7, 7])
    """


class FeatherConv3d(ConvolutionLayer, nn.Conv3d):
    """``torch.nn.Conv3d`` with P(weight): ``y = conv3d(x, P(weight)) + bias``.

    (N, C_in, D, H, W) -> (N, C_out, D_out, H_out, W_out), with or without N. ``weight``, (C_out, C_in / groups,
    k_D, k_H, k_W), is the latent weight. All arguments of torch's layer keep their meaning. Backward keeps or
    recomputes P(weight), as in ``FeatherLinear``.

    Example:
        >>> layer = nn.Conv3d(4, 8, kernel_size=3, stride=2)
        >>> sparsifier = fk.Sparsifier(layer, schedule=fk.ConstantSchedule(0.5))
        >>> layer(torch.randn(2, 4, 7, 7, 7)).shape
        torch.Size([2, 8, 3, 3, 3])
    """


class FeatherConvTranspose1d(TransposedConvolutionLayer, nn.ConvTranspose1d):
    """``torch.nn.ConvTranspose1d`` with P(weight): ``y = conv_transpose1d(x, P(weight)) + bias``.

    (N, C_in, L) -> (N, C_out, L_out), with or without N; ``weight``, (C_in, C_out / groups, k), is the
    latent weight. The rest is as in the convolution.

    Example:
        >>> layer = nn.ConvTranspose1d(4, 8, kernel_size=2, stride=2)
        >>> sparsifier = fk.Sparsifier(layer, schedule=fk.ConstantSchedule(0.5))
        >>> layer(torch.randn(2, 4, 7)).shape
        torch.Size([2, 8, 14])
    """

    transposed_convolution = torch.conv_transpose1d


class FeatherConvTranspose2d(TransposedConvolutionLayer, nn.ConvTranspose2d):
    """``torch.nn.ConvTranspose2d`` with P(weight): ``y = conv_transpose2d(x, P(weight)) + bias``.

    (N, C_in, H, W) -> (N, C_out, H_out, W_out), with or without N; ``weight``, (C_in, C_out / groups, k_H, k_W), is the
    latent weight. The rest is as in the convolution.

    Example:
        >>> layer = nn.ConvTranspose2d(4, 8, kernel_size=2, stride=2)
        >>> sparsifier = fk.Sparsifier(layer, schedule=fk.ConstantSchedule(0.5))
        >>> layer(torch.randn(2, 4, 7, 7)).shape
        torch.Size([2, 8, 14, 14])
    """

    transposed_convolution = torch.conv_transpose2d


class FeatherConvTranspose3d(TransposedConvolutionLayer, nn.ConvTranspose3d):
    """``torch.nn.ConvTranspose3d`` with P(weight): ``y = conv_transpose3d(x, P(weight)) + bias``.

    (N, C_in, D, H, W) -> (N, C_out, D_out, H_out, W_out), with or without N. ``weight``, (C_in, C_out / groups,
    k_D, k_H, k_W), is the latent weight. The rest is as in ``FeatherConv3d``.

    Example:
        >>> layer = nn.ConvTranspose3d(4, 8, kernel_size=2, stride=2)
        >>> sparsifier = fk.Sparsifier(layer, schedule=fk.ConstantSchedule(0.5))
        >>> layer(torch.randn(2, 4, 7, 7, 7)).shape
        torch.Size([2, 8, 14, 14, 14])
    """

    transposed_convolution = torch.conv_transpose3d
