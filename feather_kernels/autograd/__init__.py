"""Differentiable functions over the ops: the thresholding operator, and lean forms of layers that compute with it.

A lean form saves its input, its weight and the threshold for backward, which computes P(w) again.
"""

from feather_kernels.autograd.convolution import lean_convolution
from feather_kernels.autograd.lean import autocast_dtype
from feather_kernels.autograd.linear import lean_linear
from feather_kernels.autograd.threshold import SparseWeight, threshold

__all__ = ["SparseWeight", "autocast_dtype", "lean_convolution", "lean_linear", "threshold"]
