"""Dtypes of weights, of the arithmetic on them, and of the integer keys that order their magnitudes.

The key of a magnitude is its bit pattern as an integer: keys of float32 have 31 bits, those of float64 have 63. They
ascend as the magnitudes do, and all NaNs share one key, just above that of infinity.
"""

import torch

WEIGHT_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which predicates and formulas are evaluated for weights of ``dtype``.

    Args:
        dtype: of the weights; float64 is computed in float64, every other dtype in float32.
    """
    return torch.float64 if dtype == torch.float64 else torch.float32


COMPUTE_DTYPE = {dtype: compute_dtype(dtype) for dtype in WEIGHT_DTYPES}  # for the ops, which look it up at every call
BITS_DTYPE = {  # the integers of the same size, to which bits are viewed
    torch.float16: torch.int16,
    torch.bfloat16: torch.int16,
    torch.float32: torch.int32,
    torch.float64: torch.int64,
}
KEY_BITS = {torch.float32: 31, torch.float64: 63}
NAN_KEY = {torch.float32: 0x7F800001, torch.float64: 0x7FF0000000000001}
