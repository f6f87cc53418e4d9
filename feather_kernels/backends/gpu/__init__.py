"""Parts that the Triton and the CUDA C++ backend share."""
