"""Backends: modules that fill tensors with results. Each of them is an ``interface.Backend``."""
