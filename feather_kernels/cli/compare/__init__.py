"""``feather-kernels compare``: a grid of methods, sparsities and seeds over a recipe, its table and its figures."""
