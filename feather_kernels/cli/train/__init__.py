"""``feather-kernels train``: trains a network by a recipe; beyond torch it needs the extra ``train``."""
