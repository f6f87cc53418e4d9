"""The sparse layers, one per layer of torch, and the thresholds that they read."""

from feather_kernels.nn.attention import FeatherMultiheadAttention
from feather_kernels.nn.base import SparseLayer
from feather_kernels.nn.convolution import (
    FeatherConv1d,
    FeatherConv2d,
    FeatherConv3d,
    FeatherConvTranspose1d,
    FeatherConvTranspose2d,
    FeatherConvTranspose3d,
)
from feather_kernels.nn.linear import FeatherLinear
from feather_kernels.nn.recurrent import FeatherGRU, FeatherLSTM, FeatherRNN
from feather_kernels.nn.thresholds import Thresholds

__all__ = [
    "FeatherConv1d",
    "FeatherConv2d",
    "FeatherConv3d",
    "FeatherConvTranspose1d",
    "FeatherConvTranspose2d",
    "FeatherConvTranspose3d",
    "FeatherGRU",
    "FeatherLSTM",
    "FeatherLinear",
    "FeatherMultiheadAttention",
    "FeatherRNN",
    "SparseLayer",
    "Thresholds",
]
