"""One layer's attention under a head plan, in PyTorch and through the kernels."""
