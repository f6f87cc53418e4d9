"""Backends: leaves that fill tensors. What each must define is ``feather_kernels.ops.dispatch.Backend``."""
