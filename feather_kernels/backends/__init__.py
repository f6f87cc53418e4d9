"""Backends: leaves that fill tensors. What each must define is ``interface.Backend``."""
