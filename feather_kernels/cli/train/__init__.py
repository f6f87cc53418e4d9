"""Training recipes behind ``feather-kernels train``; what they need beyond torch is the extra ``train``."""
