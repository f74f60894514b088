"""The operations in C++, compiled on first use: the bits of `epi_ds.kernels.reference`, but for sums of squares."""
