"""Benchmarks of feather_kernels, run from a checkout: ``python -m benchmarks run``. See benchmarks/README.md."""
