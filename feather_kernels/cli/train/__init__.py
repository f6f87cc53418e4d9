"""``feather-kernels train``: trains a network by a recipe; beyond torch it needs the extra ``train``."""

from feather_kernels.cli.train.saved_model import load_model

__all__ = ["load_model"]
