"""``feather-kernels compare``: trains a grid of methods, sparsities and seeds, and writes its table and figures."""
