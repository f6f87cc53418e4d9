"""Differentiable functions over the ops: the thresholding operator, and layers whose backward recomputes P(w).

A recomputing layer saves its input, its weight and the threshold for backward, which computes P(w) again.
"""

from feather_kernels.autograd.convolution import recomputing_convolution
from feather_kernels.autograd.linear import recomputing_linear
from feather_kernels.autograd.recompute import autocast_dtype
from feather_kernels.autograd.threshold import SparseWeight, threshold

__all__ = ["SparseWeight", "autocast_dtype", "recomputing_convolution", "recomputing_linear", "threshold"]
