"""Sparse layers and the thresholds that they read."""

from feather_kernels.nn.base import SparseLayer
from feather_kernels.nn.calling import (
    FeatherConv1d,
    FeatherConv2d,
    FeatherConv3d,
    FeatherConvTranspose1d,
    FeatherConvTranspose2d,
    FeatherConvTranspose3d,
    FeatherLinear,
)
from feather_kernels.nn.reading import FeatherGRU, FeatherLSTM, FeatherMultiheadAttention, FeatherRNN
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
