"""torch.autograd.Functions over the ops: the operator itself, and one Function per family of layers.

A layer's Function saves its input, its weight and the threshold, never P(w): backward computes P(w) again and scales
the weight gradient in place, so no second copy of the weights and no mask lives between forward and backward.
"""

from feather_kernels.autograd.convolution import convolution
from feather_kernels.autograd.linear import linear
from feather_kernels.autograd.threshold import threshold

__all__ = ["convolution", "linear", "threshold"]
