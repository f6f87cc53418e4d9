"""Programs for developers of this package, and the PTX executor on which they run kernels without a GPU."""
