"""Sparse layers and the thresholds that they read."""

from feather_kernels.nn.layers import FeatherConv2d, FeatherLinear, SparseLayer
from feather_kernels.nn.thresholds import Thresholds

__all__ = ["FeatherConv2d", "FeatherLinear", "SparseLayer", "Thresholds"]
